#include "helpers.h"

PYBIND11_MODULE(_helpers, module) {
  module.doc() = "Native forms of functions in megallm.data.samples.";
  megallm::data::add_fetch(module);
  megallm::data::add_indices(module);
  megallm::data::add_mapping(module);
  megallm::data::add_shuffle(module);
}
