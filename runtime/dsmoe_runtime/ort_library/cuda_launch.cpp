// Evaluates a range for a number of tokens and hands its kernels to the driver.
#include "cuda_launch.h"

#include <cstring>
#include <limits>

#include "kernel.h"

namespace dsmoe::cuda {
namespace {

constexpr int64_t ROOM_ALIGNMENT = 256;
constexpr int64_t MOST_PROGRAMS[3] = {std::numeric_limits<int32_t>::max(), 65535, 65535};

// An argument as an entry reads it.
struct alignas(128) Slot {
  char bytes[sizeof(TensorMap)];
};

template <class Value>
void put(Slot& slot, const Value& value) {
  std::memcpy(slot.bytes, &value, sizeof value);
}

Pointer address(const Argument& argument, int64_t tokens, const std::vector<Pointer>& buffers) {
  return argument.buffer == NO_BUFFER ? 0 : buffers.at(argument.buffer) + argument.value(tokens);
}

TensorMap map(const Argument& argument, int64_t tokens, const std::vector<Pointer>& buffers) {
  constexpr uint32_t every[] = {1, 1, 1, 1, 1};
  uint64_t sizes[5], strides[5];
  const size_t rank = argument.box.size();
  for (size_t i = 0; i < rank; ++i) {
    sizes[i] = static_cast<uint64_t>(argument.sizes[i](tokens));
    if (i > 0) strides[i - 1] = static_cast<uint64_t>(argument.strides[i](tokens));  // the innermost is an element
  }
  TensorMap made;
  check(driver().cuTensorMapEncodeTiled(
            &made, argument.element, static_cast<uint32_t>(rank),
            reinterpret_cast<void*>(address(argument, tokens, buffers)), sizes, strides, argument.box.data(), every,
            INTERLEAVE_NONE, argument.swizzle, PROMOTE_TO_128_BYTES, ZEROS_OUTSIDE),
        "describing a tensor to the copy engine");
  return made;
}

void fill(Slot& slot, const Argument& argument, int64_t tokens, const std::vector<Pointer>& buffers) {
  switch (argument.kind) {
    case Argument::POINTER: return put(slot, address(argument, tokens, buffers));
    case Argument::LONG: return put(slot, argument.value(tokens));
    case Argument::FLOAT: return put(slot, argument.real);
    case Argument::MAP: return put(slot, map(argument, tokens, buffers));
    case Argument::INT: break;
  }
  const int64_t value = argument.value(tokens);
  if (value != static_cast<int32_t>(value)) throw Refusal(text("dsmoe::DsMoE: ", tokens, " tokens are too many"));
  put(slot, static_cast<int32_t>(value));
}

}  // namespace

std::vector<int64_t> laid_out(const Range& range, int64_t tokens) {
  std::vector<int64_t> begins{0};
  for (const Expression& room : range.rooms) {
    const int64_t size = room(tokens);
    begins.push_back(begins.back() + (size + ROOM_ALIGNMENT - 1) / ROOM_ALIGNMENT * ROOM_ALIGNMENT);
  }
  return begins;
}

void launch(const Folder& folder, const Range& range, int64_t tokens, const std::vector<Pointer>& buffers,
            Stream stream) {
  std::vector<Slot> slots;
  std::vector<void*> places;
  for (const Launch& wanted : range.launches) {
    const Kernel& kernel = folder.programs().kernels[wanted.kernel];
    LaunchAttribute early{PROGRAMMATIC_STREAM_SERIALIZATION, 0, {1}};
    LaunchConfig config{{}, {kernel.threads, 1, 1}, kernel.shared_bytes, stream, &early, kernel.early ? 1u : 0u};
    for (int i = 0; i < 3; ++i) {
      const int64_t size = wanted.grid[i](tokens);
      if (size < 1 || size > MOST_PROGRAMS[i])
        throw Refusal(text("dsmoe::DsMoE: ", tokens, " tokens want ", size, " programs of ", kernel.entry,
                           ", and CUDA takes 1 to ", MOST_PROGRAMS[i], "; split the batch"));
      config.grid[i] = static_cast<unsigned>(size);
    }
    slots.resize(wanted.arguments.size());
    places.resize(slots.size());
    for (size_t i = 0; i < slots.size(); ++i) {
      fill(slots[i], wanted.arguments[i], tokens, buffers);
      places[i] = slots[i].bytes;
    }
    const Function entry = folder.function(wanted.kernel);
    check(driver().cuLaunchKernelEx(&config, entry, places.data(), nullptr), kernel.entry.c_str());
  }
}

}  // namespace dsmoe::cuda
