// The folder `kernels/`: its programs, read once, and its machine code, loaded when it is first launched.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda_driver.h"
#include "cuda_programs.h"

namespace dsmoe::cuda {

class Folder {
 public:
  explicit Folder(std::string path);  // throws if there are no programs in it

  const Programs& programs() const { return programs_; }

  // The program for such nodes, and the range of T; throw with what there is.
  const Program& program(const std::string& key) const;
  static const Range& range(const Program& program, int64_t tokens);

  // An entry, in the context of this thread.
  Function function(size_t kernel) const;

 private:
  std::string path_;
  Programs programs_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<Context, size_t>, Function> functions_;
};

// That at `path`, for the rest of the process; if it is replaced, those who ask later get the new one.
const Folder& folder(const std::string& path);

}  // namespace dsmoe::cuda
