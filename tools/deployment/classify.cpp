// Classify a picture with a file of `export.py --aoti`, without Python: classify MODEL.pt2 PICTURE.pt [LIBRARY]
//
// PICTURE.pt is the normalised tensor (1, channels, H, W), written by torch.save. A file without `--plain` calls the
// native kernels: LIBRARY is mmlocalmamba/ops/_cpu*.so. docs/deployment.md has the commands.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <regex>
#include <sstream>

int main(int argc, char** argv) {
  TORCH_CHECK(argc >= 3, "usage: classify MODEL.pt2 PICTURE.pt [LIBRARY]");
  c10::InferenceMode guard;
  auto facts = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(argv[1], "model");

  // The file lists the operators that are not PyTorch's own. The library has their kernels.
  torch::Library library(torch::Library::DEF, "mmlocalmamba", std::nullopt, __FILE__, __LINE__);
  std::istringstream schemas(facts["operators"]);
  for (std::string schema; std::getline(schemas, schema);) library.def(torch::schema(schema.c_str()));
  TORCH_CHECK(argc < 4 || dlopen(argv[3], RTLD_LAZY), dlerror());  // not RTLD_NOW: that would need Python
  TORCH_CHECK(argc > 3 || facts["operators"].empty(), argv[1], " needs mmlocalmamba/ops/_cpu*.so as third argument");

  std::ifstream file(argv[2], std::ios::binary);
  TORCH_CHECK(file, "cannot read ", argv[2]);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor logits = model.run({torch::pickle_load(bytes).toTensor()})[0];

  const int64_t best = logits[0].argmax().item<int64_t>();
  const std::regex name(R"r("((?:[^"\\]|\\.)*)")r");  // of the JSON list of classes
  std::sregex_iterator found(facts["classes"].begin(), facts["classes"].end(), name), end;
  for (int64_t i = 0; i < best && found != end; ++i) ++found;
  std::cout << (found == end ? std::to_string(best) : (*found)[1].str()) << " " << logits[0][best].item<float>() << "\n";
}
