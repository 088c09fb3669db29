// Reads `programs.txt`, and evaluates what depends on the number of tokens.
#include "cuda_programs.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernel.h"

namespace dsmoe::cuda {
namespace {

constexpr int64_t FORMAT = 2, MOST_DIMENSIONS = 5;

// Division and remainder as Python has them: rounded towards minus infinity.
int64_t floored(int64_t left, int64_t right) { return left / right - (left % right != 0 && (left < 0) != (right < 0)); }

// The words of one line, taken one after the other.
class Words {
 public:
  explicit Words(const std::string& line) : stream_(line) {}

  bool empty() { return (stream_ >> std::ws).eof(); }

  std::string word() {
    std::string found;
    if (!(stream_ >> found)) throw std::runtime_error("a word is missing");
    return found;
  }

  int64_t number() {
    const std::string found = word();
    char* end = nullptr;
    const int64_t value = std::strtoll(found.c_str(), &end, 10);
    if (*end != '\0') throw std::runtime_error(text("'", found, "' is no whole number"));
    return value;
  }

  float real() {
    const std::string found = word();
    char* end = nullptr;
    const auto bits = static_cast<uint32_t>(std::strtoul(found.c_str(), &end, 16));
    if (found.size() != 8 || *end != '\0') throw std::runtime_error(text("'", found, "' is no 32 bits"));
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  std::vector<std::string> names() {  // apart by commas
    std::vector<std::string> found;
    std::istringstream all(word());
    for (std::string name; std::getline(all, name, ',');) found.push_back(name);
    return found;
  }

  std::string rest() {
    std::string found;
    std::getline(stream_ >> std::ws, found);
    if (found.empty()) throw std::runtime_error("a word is missing");
    return found.substr(0, found.find_last_not_of(' ') + 1);
  }

  Expression expression() { return Expression(word()); }

 private:
  std::istringstream stream_;
};

int buffer(const std::string& name, const Program& program, const Range& range) {
  if (name == "none") return NO_BUFFER;
  const int64_t others = static_cast<int64_t>(program.buffers.size());
  for (int64_t i = 0; i < others; ++i)
    if (name == program.buffers[i]) return static_cast<int>(i);
  if (name.rfind("room", 0) != 0) throw std::runtime_error(text("there is no buffer '", name, "'"));
  const int64_t room = Words(name.substr(4)).number();
  if (room < 0 || room >= static_cast<int64_t>(range.rooms.size())) throw std::runtime_error("there is no such room");
  return static_cast<int>(others + room);
}

Argument map(Words& words, const Program& program, const Range& range) {
  Argument made;
  made.kind = Argument::MAP;
  made.buffer = buffer(words.word(), program, range);
  made.value = words.expression();
  made.element = static_cast<int>(words.number());
  made.swizzle = static_cast<int>(words.number());
  const int64_t rank = words.number();
  if (rank < 1 || rank > MOST_DIMENSIONS) throw std::runtime_error(text("a map of ", rank, " dimensions"));
  made.sizes.resize(rank);
  made.strides.resize(rank);
  made.box.resize(rank);
  for (auto* each : {&made.sizes, &made.strides})
    for (int64_t i = rank; i-- > 0;) (*each)[i] = words.expression();
  for (int64_t i = rank; i-- > 0;) made.box[i] = static_cast<uint32_t>(words.number());
  return made;
}

Argument argument(const std::string& kind, Words& words, const Program& program, const Range& range) {
  if (kind == "map") return map(words, program, range);
  Argument made;
  if (kind == "pointer") {
    made.buffer = buffer(words.word(), program, range);
    made.value = words.expression();
  } else if (kind == "int" || kind == "long") {
    made.kind = kind == "int" ? Argument::INT : Argument::LONG;
    made.value = words.expression();
  } else if (kind == "float") {
    made.kind = Argument::FLOAT;
    made.real = words.real();
  } else {
    throw std::runtime_error(text("there is no statement '", kind, "'"));
  }
  return made;
}

template <class Element>
Element& last(std::vector<Element>& all, const char* what) {
  if (all.empty()) throw std::runtime_error(text("a ", what, " must come before this"));
  return all.back();
}

// One statement, into what was read before it.
void statement(const std::string& kind, Words& words, Programs& read) {
  if (kind == "capability") {
    read.major = static_cast<int>(words.number());
    read.minor = static_cast<int>(words.number());
  } else if (kind == "kernel") {
    Kernel made;
    made.file = words.word();
    made.entry = words.word();
    made.threads = static_cast<unsigned>(words.number());
    made.shared_bytes = static_cast<unsigned>(words.number());
    made.early = words.number() != 0;
    if (made.file.find('/') != std::string::npos) throw std::runtime_error(text(made.file, " is not in this folder"));
    read.kernels.push_back(made);
  } else if (kind == "program") {
    Program made;
    made.buffers = words.names();
    for (std::string& output : words.names()) made.buffers.push_back(std::move(output));
    made.key = words.rest();
    read.programs.push_back(std::move(made));
  } else if (kind == "tokens") {
    const int64_t first = words.number();
    last(read.programs, "program").ranges.push_back({first, words.number(), {}, {}});
  } else {
    const Program& program = last(read.programs, "program");
    Range& range = last(read.programs.back().ranges, "range of tokens");
    if (kind == "room") {
      range.rooms.push_back(words.expression());
    } else if (kind == "launch") {
      Launch made;
      made.kernel = static_cast<size_t>(words.number());
      if (made.kernel >= read.kernels.size()) throw std::runtime_error(text("there is no kernel ", made.kernel));
      for (Expression& size : made.grid) size = words.expression();
      range.launches.push_back(made);
    } else {
      last(range.launches, "launch").arguments.push_back(argument(kind, words, program, range));
    }
  }
}

}  // namespace

Expression::Expression(const std::string& written) {
  std::istringstream words(written);
  int64_t held = 0;  // operands
  for (std::string word; std::getline(words, word, ',');) {
    Step step{word == "T" ? 'T' : word == "min" ? 'm' : word == "max" ? 'M' : 'n', 0};
    if (word.size() == 1 && std::string("+*/%").find(word) != std::string::npos) step.operation = word[0];
    if (step.operation == 'n') step.number = Words(word).number();
    held += step.operation == 'n' || step.operation == 'T' ? 1 : -1;
    if (held < 1) break;
    steps_.push_back(step);
  }
  if (held != 1) throw std::runtime_error(text("'", written, "' is no expression"));
}

int64_t Expression::operator()(int64_t tokens) const {
  std::vector<int64_t> stack;
  for (const Step& step : steps_) {
    if (step.operation == 'n' || step.operation == 'T') {
      stack.push_back(step.operation == 'T' ? tokens : step.number);
      continue;
    }
    const int64_t right = stack.back();
    stack.pop_back();
    int64_t& value = stack.back();
    if ((step.operation == '/' || step.operation == '%') && right == 0) throw std::runtime_error("division by zero");
    switch (step.operation) {
      case '+': value += right; break;
      case '*': value *= right; break;
      case '/': value = floored(value, right); break;
      case '%': value -= right * floored(value, right); break;
      case 'm': value = std::min(value, right); break;
      default: value = std::max(value, right); break;
    }
  }
  return stack.back();
}

Programs read_programs(std::istream& lines, const std::string& name) {
  Programs read;
  bool begun = false, ended = false;
  size_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    try {
      Words words(line.substr(0, line.find('#')));
      if (words.empty()) continue;
      const std::string kind = words.word();
      if (!begun) {
        if (kind != "dsmoe-programs") throw std::runtime_error("this is no file of programs");
        if (const int64_t format = words.number(); format != FORMAT)
          throw std::runtime_error(
              text("its format is ", format, ", and this library reads ", FORMAT, "; export the model anew"));
        begun = true;
      } else if (ended) {
        throw std::runtime_error("nothing comes after 'end'");
      } else if (kind == "end") {
        ended = true;
      } else {
        statement(kind, words, read);
      }
      if (!words.empty()) throw std::runtime_error("there are words too many");
    } catch (const std::exception& error) {
      throw Refusal(text("dsmoe::DsMoE: ", name, ", line ", number, ": ", error.what()));
    }
  }
  if (!ended) throw Refusal(text("dsmoe::DsMoE: ", name, " is not whole: it has no 'end'"));
  return read;
}

}  // namespace dsmoe::cuda
