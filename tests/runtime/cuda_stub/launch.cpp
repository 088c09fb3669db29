// Launches what a folder has for a key and a number of tokens: `launch FOLDER T WORD WORD ...`.
//
// Inputs and outputs begin at multiples of 2^32, rooms at those of 2^40; nothing is read from there.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "cuda_launch.h"

using namespace dsmoe::cuda;

int main(int count, char** words) try {
  const int64_t tokens = std::atoll(words[2]);
  std::string key = words[3];
  for (int i = 4; i < count; ++i) key += std::string(" ") + words[i];
  const Folder& found = folder(words[1]);
  const Program& program = found.program(key);
  const Range& range = Folder::range(program, tokens);
  std::vector<Pointer> buffers;
  for (Pointer i = 1; i <= program.buffers.size(); ++i) buffers.push_back(i << 32);
  for (const int64_t begin : laid_out(range, tokens)) buffers.push_back((Pointer{1} << 40) + begin);
  buffers.pop_back();
  launch(found, range, tokens, buffers, reinterpret_cast<Stream>(7));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
