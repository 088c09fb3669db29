// What `programs.txt` says (its format: programs.py): which kernels a node launches for a number of tokens T, and how.
#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

namespace dsmoe::cuda {

// A whole number that depends on T: operands come before what joins them, `6,T,*`.
class Expression {
 public:
  Expression() = default;
  explicit Expression(const std::string& written);  // throws if it is none
  int64_t operator()(int64_t tokens) const;

 private:
  struct Step {
    char operation;  // + * / % m(in) M(ax), n(umber), T
    int64_t number;
  };
  std::vector<Step> steps_;
};

struct Kernel {
  std::string file, entry;
  unsigned threads = 0, shared_bytes = 0;
  bool early = false;  // it may start before the kernel ahead has ended
};

inline constexpr int NO_BUFFER = -1;

struct Argument {
  enum Kind { POINTER, INT, LONG, FLOAT, MAP } kind = POINTER;
  int buffer = NO_BUFFER;  // else the node's inputs by place, its outputs, the rooms
  Expression value;  // a number, or a pointer's offset
  float real = 0;
  int element = 0, swizzle = 0;  // of a map, whose dimensions are here the innermost first
  std::vector<Expression> sizes, strides;
  std::vector<uint32_t> box;
};

struct Launch {
  size_t kernel = 0;
  Expression grid[3];
  std::vector<Argument> arguments;
};

struct Range {
  int64_t first = 0, last = 0;
  std::vector<Expression> rooms;
  std::vector<Launch> launches;
};

struct Program {
  std::string key;  // of the nodes that it serves
  std::vector<std::string> buffers;  // their inputs and outputs
  std::vector<Range> ranges;
};

struct Programs {
  int major = 0, minor = 0;
  std::vector<Kernel> kernels;
  std::vector<Program> programs;
};

// Throws, with the line, if the text is none of ours, or is not whole.
Programs read_programs(std::istream& lines, const std::string& name);

}  // namespace dsmoe::cuda
