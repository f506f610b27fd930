// The Python module `megallm._C`. Loading it runs the static registrations of the operators; the module itself only
// says what was built.

#include <Python.h>

namespace {
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
}

PyMODINIT_FUNC PyInit__C(void) {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) {
    return nullptr;
  }
  // As given to the compiler, for example "8.0;9.0+PTX"; empty without CUDA operators.
  if (PyModule_AddStringConstant(module, "cuda_architectures", MEGALLM_CUDA_ARCHITECTURES) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
