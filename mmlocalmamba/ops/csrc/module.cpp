// The Python module: importing it registers the operators that ops/cpu.py declares.

#include <Python.h>
#include <torch/version.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "host.h"

namespace mmlocalmamba {
namespace {

std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    sets.push_back(&kAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kPortable);
  return sets;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const std::vector<const InstructionSet*> sets = supported();
  const char* wanted = std::getenv("MMLOCALMAMBA_CPU_ISA");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (const InstructionSet* set : sets) {
    if (std::string(wanted) == set->name) return *set;
    names += std::string(names.empty() ? "" : ", ") + set->name;
  }
  TORCH_CHECK_VALUE(false, "MMLOCALMAMBA_CPU_ISA=", wanted, ": this machine can run ", names);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : supported()) names.emplace_back(set->name);
  return names;
}

Tensor ordered_sum(const Tensor& x) {
  if (x.size(0) == 1) return x[0];
  Tensor sum = at::empty(x.sizes().slice(1), x.options());
  const int64_t count = x.size(0), size = sum.numel();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "ordered_sum", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = sum.mutable_data_ptr<scalar_t>();
    // Pieces that stay in the first cache over the summands.
    at::parallel_for(0, (size + 1023) / 1024, 16, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece * 1024, last = std::min(size, first + 1024);
        for (int64_t j = first; j < last; ++j) to[j] = count ? from[j] : scalar_t(0);
        for (int64_t i = 1; i < count; ++i) {
          for (int64_t j = first; j < last; ++j) to[j] += from[i * size + j];
        }
      }
    });
  });
  return sum;
}

}  // namespace mmlocalmamba

namespace {

PyObject* instruction_sets(PyObject*, PyObject*) {
  const std::vector<std::string> names = mmlocalmamba::instruction_sets();
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(names.size()));
  for (size_t i = 0; list && i < names.size(); ++i) {
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), PyUnicode_FromString(names[i].c_str()));
  }
  return list;
}

PyMethodDef methods[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS, "Names of the instruction sets this machine can run, best first."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* self = PyModule_Create(&module);
  if (self) PyModule_AddStringConstant(self, "TORCH_VERSION", TORCH_VERSION);
  return self;
}
