// What the parts of megallm.data.samples._helpers share.
//
// Each function has a reference in Python or numpy with the same arguments, results and errors; tests hold the two
// together.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace megallm::data {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Each part adds its functions to the module.
void add_fetch(py::module_& module);
void add_indices(py::module_& module);
void add_mapping(py::module_& module);
void add_shuffle(py::module_& module);

}  // namespace megallm::data
