// Greedy text, as token ids, from an artifact of `dsmoe compile`; no Python in the process.
//
//   generate ARTIFACT 256,72,101 32        prints the 32 ids that follow these three
//
// An artifact holds two packages, prefill.pt2 and decode.pt2, that share one set of weights: each package gets the
// tensors lent by name, so they are in memory once. The caches are inputs that the packages write in place.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "json.h"
#include "safetensors.h"

using torch::inductor::AOTIModelPackageLoader;

static Json read_json(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path.string() + " cannot be read: is its folder an artifact?");
  std::stringstream text;
  text << file.rdbuf();
  return Json::parse(text.str());
}

class Artifact {
 public:
  Artifact(const std::filesystem::path& folder, const at::Device& device, const Json& manifest)
      : weights_(read_weights(folder / "weights", device)) {
    prefill = open(folder, manifest, "prefill");
    decode = open(folder, manifest, "decode");
  }
  std::unique_ptr<AOTIModelPackageLoader> prefill, decode;

 private:
  Weights weights_;

  std::unique_ptr<AOTIModelPackageLoader> open(const std::filesystem::path& folder, const Json& manifest, const std::string& name) {
    const Json& phase = manifest.at("phases").at(name);
    for (const auto& [op, calls] : phase.at("operators").fields)
      if (op.find("dsmoe::") == 0)
        throw std::runtime_error(name + " calls " + op + ", which is Python: compile with --target cuda, or a model without experts");
    auto path = (folder / phase.at("file").text).string();
    auto package = std::make_unique<AOTIModelPackageLoader>(path, "model", /*run_single_threaded=*/true);
    Weights constants;  // the package's own names for the weights
    for (const auto& [own, stored] : phase.at("constants").fields) constants[own] = weights_.at(stored.text);
    package->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    return package;
  }
};

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: generate ARTIFACT ID,ID,... NEW_TOKENS\n";
    return 2;
  }
  torch::NoGradGuard no_grad;
  const std::filesystem::path folder = argv[1];
  const Json manifest = read_json(folder / "manifest.json"), config = read_json(folder / "config.json");
  const at::Device device(manifest.at("target").text == "cuda" ? "cuda:0" : "cpu");
  const int64_t batch = manifest.at("batch_size").integer(), capacity = manifest.at("capacity").integer();
  const int64_t layers = config.at("num_hidden_layers").integer(), vocabulary = config.at("vocab_size").integer();

  std::vector<int64_t> prompt;
  std::stringstream given(argv[2]);
  for (std::string id; std::getline(given, id, ',');) prompt.push_back(std::stoll(id));
  const int64_t fresh = std::stoll(argv[3]), length = static_cast<int64_t>(prompt.size());
  for (int64_t id : prompt)  // the compiled programs trust their inputs
    if (id < 0 || id >= vocabulary) throw std::runtime_error("token " + std::to_string(id) + " is not in the vocabulary");
  if (length < 1 || fresh < 1 || length + fresh > capacity)
    throw std::runtime_error("prompt and new tokens must be at least one each and fit " + std::to_string(capacity));

  Artifact artifact(folder, device, manifest);

  const auto dtype = manifest.at("dtype").text;
  const auto floats = at::TensorOptions().device(device).dtype(
      dtype == "bfloat16" ? at::kBFloat16 : dtype == "float16" ? at::kHalf : at::kFloat);
  const auto integers = at::TensorOptions().device(device).dtype(at::kLong);
  std::vector<at::Tensor> caches;  // all keys, then all values
  for (int64_t i = 0; i < 2 * layers; i++)
    caches.push_back(torch::zeros(
        {batch, config.at("num_key_value_heads").integer(), capacity, config.at("head_dim").integer()}, floats));

  auto ids = torch::tensor(prompt).to(integers).repeat({batch, 1});
  std::vector<at::Tensor> inputs = {ids};
  inputs.insert(inputs.end(), caches.begin(), caches.end());
  auto logits = artifact.prefill->run(inputs)[0];  // [batch, vocabulary] of the last position; [1]: experts chosen

  auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < fresh; i++) {
    ids = logits.argmax(-1, /*keepdim=*/true);
    std::cout << ids[0].item<int64_t>() << (i + 1 < fresh ? "," : "\n") << std::flush;
    if (i + 1 == fresh) break;
    inputs = {ids, torch::full({1}, length + i, integers)};
    inputs.insert(inputs.end(), caches.begin(), caches.end());
    logits = artifact.decode->run(inputs)[0];
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cerr << (fresh - 1) / seconds.count() << " tokens/s\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << "generate: " << error.what() << "\n";
  return 1;
}
