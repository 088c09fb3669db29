// Reads the folder, and loads cubins into the contexts that ask for them.
#include "cuda_folder.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <system_error>
#include <vector>

#include "kernel.h"

namespace dsmoe::cuda {
namespace {

constexpr const char* PROGRAMS = "/programs.txt";
constexpr const char* REMEDY =
    "export the model with --profile ort-cuda, and put its folder kernels/ beside this library, or name it in the "
    "session's config entry dsmoe.kernels";
constexpr unsigned GRANTED_SHARED_BYTES = 48 * 1024;  // without being asked

Programs read_folder(const std::string& path) {
  const std::string name = path + PROGRAMS;
  std::ifstream file(name);
  if (!file) throw Refusal(text("dsmoe::DsMoE: no kernels for GPUs: ", name, " cannot be read; ", REMEDY));
  return read_programs(file, name);
}

std::vector<char> bytes_of(const std::string& name) {
  std::ifstream file(name, std::ios::binary);
  if (!file) throw Refusal(text("dsmoe::DsMoE: ", name, " cannot be read; ", REMEDY));
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

Folder::Folder(std::string path) : path_(std::move(path)), programs_(read_folder(path_)) {}

const Program& Folder::program(const std::string& key) const {
  std::string others;
  for (const Program& program : programs_.programs) {
    if (program.key == key) return program;
    others += "; " + program.key;
  }
  throw Refusal(text("dsmoe::DsMoE: ", path_, " has no kernels for ", key, "; it has some for",
                     others.empty() ? " nothing" : others.substr(1)));
}

const Range& Folder::range(const Program& program, int64_t tokens) {
  for (const Range& range : program.ranges)
    if (range.first <= tokens && tokens <= range.last) return range;
  const int64_t most = program.ranges.empty() ? 0 : program.ranges.back().last;
  throw Refusal(
      text("dsmoe::DsMoE: x has ", tokens, " tokens, and there are kernels for 1 to ", most, "; split the batch"));
}

Function Folder::function(size_t kernel) const {
  const Driver& cuda = driver();
  Context context = nullptr;
  check(cuda.cuCtxGetCurrent(&context), "asking for the context");
  if (context == nullptr) throw std::runtime_error("dsmoe::DsMoE: no CUDA context is current in this thread");
  const std::lock_guard<std::mutex> lock(mutex_);
  Function& function = functions_[{context, kernel}];
  if (function != nullptr) return function;
  int device = 0, major = 0, minor = 0;
  check(cuda.cuCtxGetDevice(&device), "asking for the device");
  check(cuda.cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device), "asking for the capability");
  check(cuda.cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device), "asking for the capability");
  if (major != programs_.major || minor != programs_.minor)
    throw Refusal(text("dsmoe::DsMoE: ", path_, " holds kernels for GPUs of compute capability ", programs_.major, ".",
                       programs_.minor, ", and this one has ", major, ".", minor, "; use an export for any machine"));
  const Kernel& wanted = programs_.kernels.at(kernel);
  const std::string file = path_ + "/" + wanted.file, loading = "loading " + file;
  const std::vector<char> image = bytes_of(file);
  Module module = nullptr;
  Function found = nullptr;
  check(cuda.cuModuleLoadData(&module, image.data()), loading.c_str());
  check(cuda.cuModuleGetFunction(&found, module, wanted.entry.c_str()), loading.c_str());
  if (wanted.shared_bytes > GRANTED_SHARED_BYTES) {
    const int bytes = static_cast<int>(wanted.shared_bytes);
    check(cuda.cuFuncSetCacheConfig(found, PREFER_SHARED), loading.c_str());
    check(cuda.cuFuncSetAttribute(found, MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes), loading.c_str());
  }
  return function = found;
}

const Folder& folder(const std::string& path) {
  using Version = std::pair<std::string, std::filesystem::file_time_type>;
  static std::mutex mutex;
  static std::map<Version, std::unique_ptr<Folder>> read;
  std::error_code none;  // a file that is not there is complained of below
  const Version version{path, std::filesystem::last_write_time(path + PROGRAMS, none)};
  const std::lock_guard<std::mutex> lock(mutex);
  auto& found = read[version];
  if (found == nullptr) found = std::make_unique<Folder>(path);
  return *found;
}

}  // namespace dsmoe::cuda
