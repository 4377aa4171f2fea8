// `program PACKAGE [LIBRARY]` runs a package of AOTInductor in a process without Python: it loads
// the library, if one is named, and prints what the model makes of a batch, a number a line.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>

int main(int count, char** arguments) {
  if (count > 2 && dlopen(arguments[2], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  try {
    torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
    const at::Tensor batch = at::linspace(-1, 1, 5 * 3 * 8 * 8).view({5, 3, 8, 8});
    for (const at::Tensor& output : loader.run({batch})) {
      const at::Tensor values = output.contiguous();
      for (int64_t i = 0; i < values.numel(); ++i) {
        std::printf("%.9g\n", values.const_data_ptr<float>()[i]);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
