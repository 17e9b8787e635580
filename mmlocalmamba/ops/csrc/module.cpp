// The Python module. Importing it registers the CPU kernels of the operators that ops/library.py declares.

#include <Python.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "host.h"

namespace mmlocalmamba {

const InstructionSet& instruction_set() {
  // getenv is not safe while another thread calls setenv, so callers use it before they start the threads of a kernel.
  TORCH_INTERNAL_ASSERT(!at::in_parallel_region());
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

Tensor checked_table(const Tensor& table, int64_t directions, int64_t tokens) {
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) == directions && table.scalar_type() == at::kInt &&
                        table.is_cpu(),
                    "src must be an int32 table of ", directions, " rows on the CPU, got ", table.scalar_type(), " ",
                    table.sizes(), " on ", table.device());
  Tensor whole = table.contiguous();
  const int32_t* entry = whole.const_data_ptr<int32_t>();
  const int64_t steps = whole.size(1);
  int32_t lowest = 0, highest = -1;
  for (int64_t i = 0; i < whole.numel(); ++i) {
    lowest = std::min(lowest, entry[i]);
    highest = std::max(highest, entry[i]);
  }
  TORCH_CHECK_INDEX(lowest >= -1 && highest < tokens, "src holds tokens from ", lowest, " to ", highest, ", there are ",
                    tokens);
  std::vector<char> permutes(directions);
  at::parallel_for(0, directions, 1 + (1 << 16) / (steps + 1), [&](int64_t begin, int64_t end) {
    std::vector<char> found(tokens + 1);  // the last place is for pads
    for (int64_t k = begin; k < end; ++k) {
      std::fill(found.begin(), found.end(), 0);
      int64_t pads = 0;
      for (int64_t t = 0; t < steps; ++t) {
        const int32_t token = entry[k * steps + t];
        pads += token < 0;
        found[token < 0 ? tokens : token] = 1;
      }
      // There are as many as tokens and none is missing, so none is there twice.
      permutes[k] = steps - pads == tokens && std::count(found.begin(), found.begin() + tokens, 1) == tokens;
    }
  });
  for (int64_t k = 0; k < directions; ++k) {
    TORCH_CHECK_VALUE(permutes[k], "row ", k, " of src must hold each of the ", tokens,
                      " tokens once, besides pads (-1)");
  }
  return whole;
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

// A program without Python loads this file too (tools/deployment/classify.cpp). Python's functions are resolved when
// they are called, its objects (Py_None, PyExc_ValueError) when the file is loaded: none may be named here.
PyObject* instruction_sets(PyObject*, PyObject*) {
  const std::vector<std::string> names = mmlocalmamba::instruction_sets();
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(names.size()));
  for (size_t i = 0; list && i < names.size(); ++i) {
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), PyUnicode_FromString(names[i].c_str()));
  }
  return list;
}

PyObject* set_library(PyObject*, PyObject* name) {
  using mmlocalmamba::Library;
  static const std::map<std::string, Library> libraries{
      {"mkl", Library::kMKL}, {"onednn", Library::kOneDNN}, {"processor", Library::kByProcessor}};
  const char* wanted = PyUnicode_AsUTF8(name);
  if (!wanted) return nullptr;
  const auto found = libraries.find(wanted);
  if (found != libraries.end()) mmlocalmamba::set_library(found->second);
  return PyBool_FromLong(found != libraries.end());
}

PyMethodDef methods[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS,
     "Names of the instruction sets this machine can run, best first."},
    {"set_library", set_library, METH_O,
     "Sets the library of products in float32, for tests: 'mkl', 'onednn' or 'processor'. Returns False for others."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* self = PyModule_Create(&module);
  if (self) PyModule_AddStringConstant(self, "TORCH_VERSION", TORCH_VERSION);
  return self;
}
