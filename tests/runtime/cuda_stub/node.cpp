// One node on a runtime that we play: `node FOLDER`, with the node's lines from standard input.
//
//     op NAME ELEMENT                    the operator; its type T, as ONNX numbers types
//     int|float|string NAME VALUE        an attribute
//     input ELEMENT SIZE SIZE ...        the next input; `input 0` is absent
//     shift PLACE BYTES                  this input does not begin where it should
//     bind OUTPUT INPUT                  this output has that input's memory
//
// Tensors begin at multiples of 2^32, inputs first, workspace at 2^40; nothing is read from there. Outputs are printed
// as they are asked for: `output PLACE SIZE SIZE ...`.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <vector>

#include "cuda.h"
#include "kernel.h"

struct OrtStatus {
  std::string words;
};
struct OrtValue {
  int element = 0;
  std::vector<int64_t> sizes;
  uint64_t address = 0;
};
struct OrtKernelInfo {
  std::map<std::string, std::string> strings;
  std::map<std::string, float> floats;
  std::map<std::string, int64_t> integers;
};
struct OrtKernelContext {
  std::vector<OrtValue> inputs;
  OrtValue outputs[3];
};
struct OrtTensorTypeAndShapeInfo : OrtValue {};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};
struct OrtAllocator {};

namespace {

OrtAllocator memory;

template <class Value>
OrtStatus* found(const std::map<std::string, Value>& all, const char* name, Value* value) {
  const auto place = all.find(name);
  if (place == all.end()) return new OrtStatus{"no attribute"};
  *value = place->second;
  return nullptr;
}

template <class Lambda>
void* plain(Lambda lambda) {
  return reinterpret_cast<void*>(+lambda);
}

void fill(void** table) {
  using Info = const OrtKernelInfo*;
  using Shape = const OrtTensorTypeAndShapeInfo*;
  table[0] = plain([](int, const char* words) { return new OrtStatus{words}; });
  table[2] = plain([](const OrtStatus* status) { return status->words.c_str(); });
  table[27] = plain([](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
    domain->ops.push_back(op);
    return nullptr;
  });
  table[51] = plain([](const OrtValue* value, void** data) -> OrtStatus* {
    *data = reinterpret_cast<void*>(value->address);
    return nullptr;
  });
  table[60] = plain([](Shape shape, int* element) -> OrtStatus* {
    *element = shape->element;
    return nullptr;
  });
  table[61] = plain([](Shape shape, size_t* count) -> OrtStatus* {
    *count = shape->sizes.size();
    return nullptr;
  });
  table[62] = plain([](Shape shape, int64_t* sizes, size_t count) -> OrtStatus* {
    std::copy_n(shape->sizes.begin(), count, sizes);
    return nullptr;
  });
  table[65] = plain([](const OrtValue* value, OrtTensorTypeAndShapeInfo** shape) -> OrtStatus* {
    *shape = new OrtTensorTypeAndShapeInfo{*value};
    return nullptr;
  });
  table[76] = plain([](OrtAllocator*, void*) -> OrtStatus* { return nullptr; });
  table[77] = plain([](const OrtAllocator*, const OrtMemoryInfo**) -> OrtStatus* { return nullptr; });
  table[85] = plain([](Info info, const char* name, float* value) { return found(info->floats, name, value); });
  table[86] = plain([](Info info, const char* name, int64_t* value) { return found(info->integers, name, value); });
  table[87] = plain([](Info info, const char* name, char* text, size_t* size) -> OrtStatus* {
    std::string value;
    if (OrtStatus* status = found(info->strings, name, &value)) return status;
    *size = value.size() + 1;
    if (text != nullptr) std::memcpy(text, value.c_str(), *size);
    return nullptr;
  });
  table[88] = plain([](const OrtKernelContext* context, size_t* count) -> OrtStatus* {
    *count = context->inputs.size();
    return nullptr;
  });
  table[90] = plain([](const OrtKernelContext* context, size_t place, const OrtValue** value) -> OrtStatus* {
    *value = context->inputs[place].element == 0 ? nullptr : &context->inputs[place];
    return nullptr;
  });
  table[91] = plain([](OrtKernelContext* context, size_t place, const int64_t* sizes, size_t count,
                       OrtValue** value) -> OrtStatus* {
    std::printf("output %zu", place);
    for (size_t i = 0; i < count; ++i) std::printf(" %lld", static_cast<long long>(sizes[i]));
    std::printf("\n");
    *value = &context->outputs[place];
    return nullptr;
  });
  table[93] = plain([](OrtStatus* status) { delete status; });
  table[99] = plain([](OrtTensorTypeAndShapeInfo* shape) { delete shape; });
  table[132] = plain([](OrtAllocator*) {});
  table[193] = plain([](const OrtKernelContext*, void** stream) -> OrtStatus* {
    *stream = reinterpret_cast<void*>(7);
    return nullptr;
  });
  table[277] = plain([](const OrtKernelContext*, const OrtMemoryInfo*, size_t, void** made) -> OrtStatus* {
    *made = reinterpret_cast<void*>(uint64_t{1} << 40);
    return nullptr;
  });
  table[278] = plain([](Info, int, OrtAllocator** found) -> OrtStatus* {
    *found = &memory;
    return nullptr;
  });
}

int complaint(const OrtStatus* status) {
  std::fprintf(stderr, "%s\n", status->words.c_str());
  return 1;
}

}  // namespace

int main(int, char** words) {
  static void* table[300];
  fill(table);
  const auto* api = reinterpret_cast<const OrtApi*>(table);
  std::string name, op;
  int element = 0;
  OrtKernelInfo info;
  OrtKernelContext context;
  std::map<size_t, size_t> bound;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream stream(line);
    std::string kind;
    stream >> kind;
    if (kind == "op") stream >> op >> element;
    if (kind == "int") stream >> name >> info.integers[name];
    if (kind == "float") stream >> name >> info.floats[name];
    if (kind == "string") stream >> name >> info.strings[name];
    if (kind == "input") {
      OrtValue& value = context.inputs.emplace_back();
      stream >> value.element;
      value.address = value.element == 0 ? 0 : uint64_t{context.inputs.size()} << 32;
      for (int64_t size = 0; stream >> size;) value.sizes.push_back(size);
    }
    if (kind == "bind") {
      size_t output = 0;
      stream >> output >> bound[output];
    }
    if (kind == "shift") {
      size_t place = 0;
      uint64_t bytes = 0;
      stream >> place >> bytes;
      context.inputs.at(place).address += bytes;
    }
  }
  OrtCustomOpDomain domain;
  dsmoe::add_cuda_ops(api, &domain, words[1]);
  dsmoe::add_cuda_layer_ops(api, &domain, words[1]);
  dsmoe::add_cuda_decode_ops(api, &domain, words[1]);
  for (const OrtCustomOp* each : domain.ops) {
    if (each->GetName(each) != op || each->GetInputType(each, 0) != element) continue;
    const size_t inputs = each->GetInputTypeCount(each);
    for (uint64_t i = 0; i < 3; ++i) context.outputs[i].address = (inputs + i + 1) << 32;
    for (const auto& [output, input] : bound) context.outputs[output].address = context.inputs.at(input).address;
    void* kernel = nullptr;
    if (OrtStatus* status = each->CreateKernelV2(each, api, &info, &kernel)) return complaint(status);
    if (OrtStatus* status = each->KernelComputeV2(kernel, &context)) return complaint(status);
    each->KernelDestroy(kernel);
    return 0;
  }
  std::fprintf(stderr, "no operator %s for %d\n", op.c_str(), element);
  return 1;
}
