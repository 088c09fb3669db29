// The weights of an artifact: `weights/*.safetensors`, read to a device one tensor at a time.
#pragma once

#include <torch/torch.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <unordered_map>

#include "json.h"

using Weights = std::unordered_map<std::string, at::Tensor>;

inline at::ScalarType scalar_type(const std::string& name) {
  static const std::unordered_map<std::string, at::ScalarType> types = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},   {"U8", at::kByte},  {"BOOL", at::kBool},
  };
  auto found = types.find(name);
  if (found == types.end()) throw std::runtime_error("a weight has the dtype " + name + ", which this reader does not know");
  return found->second;
}

// 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors.
inline void read_shard(const std::filesystem::path& path, const at::Device& device, Weights& weights) {
  std::ifstream file(path, std::ios::binary);
  uint64_t length = 0;
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  const uint64_t size = std::filesystem::file_size(path);
  if (!file || length > size - 8) throw std::runtime_error(path.string() + " is no safetensors file");
  std::string text(length, ' ');
  file.read(text.data(), static_cast<std::streamsize>(length));
  for (const auto& [name, entry] : Json::parse(text).fields) {
    if (name == "__metadata__") continue;
    std::vector<int64_t> shape;
    for (const auto& dimension : entry.at("shape").items) shape.push_back(dimension.integer());
    auto tensor = torch::empty(shape, scalar_type(entry.at("dtype").text));
    const uint64_t begin = entry.at("data_offsets").items.at(0).integer();
    const uint64_t end = entry.at("data_offsets").items.at(1).integer();
    if (end < begin || end - begin != tensor.nbytes() || 8 + length + end > size)
      throw std::runtime_error(path.string() + ": " + name + " does not fit its place");
    file.seekg(static_cast<std::streamoff>(8 + length + begin));
    file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(end - begin));
    if (!file) throw std::runtime_error(path.string() + " ends early");
    weights[name] = tensor.to(device);
  }
}

inline Weights read_weights(const std::filesystem::path& folder, const at::Device& device) {
  Weights weights;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") read_shard(entry.path(), device, weights);
  return weights;
}
