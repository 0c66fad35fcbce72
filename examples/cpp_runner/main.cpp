// Runs a package of bdc.package without Python:
//
//   run_package tenants.pt2 0,-1,1 input_ids.pt attention_mask.pt
//
// The second argument is the row index, one slot per row of the batch and -1 for the base; then come the inputs in the
// order of the exported program's, each a tensor written by torch.save. Prints the first output, one row a line.

#include <ATen/ATen.h>
#include <ATen/cpu/Utils.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using Metadata = std::unordered_map<std::string, std::string>;

// Code for a newer CPU would end in an illegal instruction: compare what it may use with what is there, before loading.
void check_cpu(const Metadata& metadata) {
  const auto here = at::cpu::get_cpu_capabilities();
  std::istringstream needed(metadata.at("bitdelta.cpu"));
  std::string missing;
  for (std::string feature; needed >> feature;) {
    const auto found = here.find(feature);
    if (found == here.end() || !found->second.isBool() || !found->second.toBool()) {
      missing += " " + feature;
    }
  }
  if (!missing.empty()) {
    throw std::runtime_error("compiled for a CPU with" + missing + ", which this one lacks: package it on such a machine");
  }
}

std::vector<int32_t> parse_row_index(const std::string& text) {
  std::vector<int32_t> slots;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    slots.push_back(std::stoi(part));
  }
  return slots;
}

at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return torch::jit::pickle_load(bytes).toTensor();
}

void run(const std::vector<std::string>& arguments) {
  using Loader = torch::inductor::AOTIModelPackageLoader;
  const auto metadata = Loader::load_metadata_from_package(arguments[0], "model");
  if (metadata.count("bitdelta.format") == 0) {
    throw std::runtime_error("not a package of bdc.package");
  }
  check_cpu(metadata);
  std::cerr << "tenants by slot: " << metadata.at("bitdelta.tenants") << "\n";

  auto slots = parse_row_index(arguments[1]);
  std::vector<at::Tensor> inputs;
  for (size_t i = 2; i < arguments.size(); ++i) {
    inputs.push_back(read_tensor(arguments[i]));
    if (inputs.back().dim() == 0 || inputs.back().size(0) != static_cast<int64_t>(slots.size())) {
      throw std::runtime_error(arguments[i] + " does not have one row per entry of the row index");
    }
  }
  inputs.push_back(at::tensor(slots, at::kInt));

  c10::InferenceMode guard;
  Loader model(arguments[0]);
  const auto rows = model.run(inputs).at(0).to(at::kFloat).flatten(1).contiguous();
  std::cout << std::setprecision(9);
  for (int64_t row = 0; row < rows.size(0); ++row) {
    for (int64_t column = 0; column < rows.size(1); ++column) {
      std::cout << (column ? " " : "") << rows[row][column].item<float>();
    }
    std::cout << "\n";
  }
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_package PACKAGE.pt2 SLOT[,SLOT...] INPUT.pt...\n";
    return 2;
  }
  try {
    run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "Error: " << argv[1] << ": " << error.what() << "\n";
    return 2;
  }
  return 0;
}
