// An extension of OpenVINO: directional scans by the kernels of mmlocalmamba/ops/csrc, which need no PyTorch.
// mmlocalmamba/deployment/openvino_kernel.py compiles it, and puts the operator into models.

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/op/op.hpp>

#include <memory>
#include <string>
#include <vector>

#include "interface.h"
#include "processor.h"

namespace mmlocalmamba {
namespace {

// Strides of a dense (B, K, rows, F), or of a (B, rows, F) that all directions share.
Strides dense(const ov::Shape& shape) {
  const int64_t width = shape.back(), rows = shape[shape.size() - 2];
  return shape.size() == 3 ? Strides{rows * width, 0, width, 1}
                           : Strides{static_cast<int64_t>(shape[1]) * rows * width, rows * width, width, 1};
}

}  // namespace

// Inputs: u (B, L, D) or (B, K, rows, D), delta (B, K, rows, R or D), B and C (B, K, rows, N), and constants that `given`
// names, in this order: A (K, D, N), weight (K, D, R), bias (K, D), skip (K, D), float32; table (K, steps), int32.
// Output: (B, K, tokens, D). See mmlocalmamba.ops.directional_scan.
class DirectionalScan : public ov::op::Op {
 public:
  OPENVINO_OP("DirectionalScan", "mmlocalmamba");

  DirectionalScan() = default;
  DirectionalScan(const ov::OutputVector& inputs, std::string given, int64_t tokens, bool in_scan_order, bool softplus)
      : Op(inputs), given_(std::move(given)), tokens_(tokens), in_scan_order_(in_scan_order), softplus_(softplus) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    NODE_VALIDATION_CHECK(this, get_input_size() == 4 + count(), "there are ", get_input_size(), " inputs for 4 and ",
                          given_);
    for (size_t i = 0; i < get_input_size(); ++i) {
      const auto wanted = has("table") && i + 1 == get_input_size() ? ov::element::i32 : ov::element::f32;
      NODE_VALIDATION_CHECK(this, get_input_element_type(i).compatible(wanted), "input ", i, " must be ", wanted,
                            ", got ", get_input_element_type(i));
    }
    const auto& delta = get_input_partial_shape(1);
    const auto& A = get_input_partial_shape(4);
    NODE_VALIDATION_CHECK(this, delta.size() == 4 && A.size() == 3, "delta must be (B, K, rows, R) and A (K, D, N)");
    set_output_type(0, ov::element::f32, ov::PartialShape{delta[0], delta[1], tokens_, A[1]});
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<DirectionalScan>(inputs, given_, tokens_, in_scan_order_, softplus_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("given", given_);
    visitor.on_attribute("tokens", tokens_);
    visitor.on_attribute("in_scan_order", in_scan_order_);
    visitor.on_attribute("softplus", softplus_);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const ov::Shape &delta = inputs[1].get_shape(), &A = inputs[4].get_shape();
    check(inputs);
    ScanProblem<float> p{};
    p.batch = delta[0], p.directions = delta[1], p.rows = p.steps = delta[2], p.tokens = tokens_;
    p.channels = A[1], p.states = A[2];
    p.in_scan_order = in_scan_order_, p.softplus = softplus_;
    p.u = inputs[0].data<const float>(), p.u_strides = dense(inputs[0].get_shape());
    p.delta = inputs[1].data<const float>(), p.delta_strides = dense(delta);
    p.B = inputs[2].data<const float>(), p.B_strides = dense(inputs[2].get_shape()), p.B_state_stride = 1;
    p.C = inputs[3].data<const float>(), p.C_strides = dense(inputs[3].get_shape()), p.C_state_stride = 1;
    p.A = inputs[4].data<const float>();
    size_t next = 5;
    if (has("weight")) p.dt_rank = delta[3], p.dt_weight = inputs[next++].data<const float>();
    if (has("bias")) p.bias = inputs[next++].data<const float>();
    if (has("skip")) p.D = inputs[next++].data<const float>();
    if (has("table")) p.steps = inputs[next].get_shape()[1], p.table = inputs[next].data<const int32_t>();
    outputs[0].set_shape({delta[0], delta[1], static_cast<size_t>(tokens_), A[1]});
    p.y = outputs[0].data<float>(), p.y_strides = dense(outputs[0].get_shape());
    std::unique_ptr<float[]> last(new float[p.batch * p.directions * p.states * p.channels]);
    p.last = last.get();

    static const InstructionSet& set = *supported().front();
    const auto& scan = set.f32.scan;
    const int64_t items = (p.channels + scan.channels - 1) / scan.channels;
    const size_t bytes = scan.scratch(p.states, p.dt_rank, false) + 64;
    ov::parallel_for(static_cast<size_t>(p.batch * p.directions * items), [&](size_t i) {
      thread_local std::vector<char> memory;
      if (memory.size() < bytes) memory.resize(bytes);
      void* scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
      const int64_t sequence = i / items;
      FlushDenormals flush;
      scan.forward(p, Item{sequence / p.directions, sequence % p.directions, static_cast<int64_t>(i) % items}, scratch);
    });
    return true;
  }

 private:
  // A file may have been changed: the kernel itself reads and writes without asking.
  void check(const ov::TensorVector& inputs) const {
    const ov::Shape &delta = inputs[1].get_shape(), &A = inputs[4].get_shape();
    const size_t batch = delta[0], K = delta[1], rows = delta[2], width = A[1], tokens = tokens_;
    const auto expect = [&](size_t i, const ov::Shape& shape) {
      OPENVINO_ASSERT(inputs[i].get_shape() == shape, "input ", i, " of DirectionalScan must be ", shape, ", got ",
                      inputs[i].get_shape());
    };
    const bool shared = inputs[0].get_shape().size() == 3 && !in_scan_order_;
    expect(0, shared ? ov::Shape{batch, rows, width} : ov::Shape{batch, K, rows, width});
    if (!has("weight")) expect(1, {batch, K, rows, width});
    for (size_t i : {2, 3}) expect(i, {batch, K, rows, A[2]});
    expect(4, {K, width, A[2]});
    size_t next = 5;
    if (has("weight")) expect(next++, {K, width, delta[3]});
    if (has("bias")) expect(next++, {K, width});
    if (has("skip")) expect(next++, {K, width});
    size_t steps = rows;
    if (has("table")) {
      steps = inputs[next].get_shape().back();
      expect(next, {K, steps});
      const int32_t* table = inputs[next].data<const int32_t>();
      for (size_t i = 0; i < K * steps; ++i) {
        OPENVINO_ASSERT(table[i] >= -1 && table[i] < tokens_, "the table of DirectionalScan has token ", table[i], " of ",
                        tokens_);
      }
    }
    OPENVINO_ASSERT((in_scan_order_ ? steps : tokens) == rows && (has("table") || tokens == steps),
                    "DirectionalScan has ", rows, " rows for ", steps, " steps and ", tokens, " tokens");
  }

  bool has(const char* name) const { return (" " + given_ + " ").find(" " + std::string(name) + " ") != given_.npos; }
  size_t count() const { return has("A") + has("weight") + has("bias") + has("skip") + has("table"); }

  std::string given_;  // names, with a space between two
  int64_t tokens_ = 0;
  bool in_scan_order_ = false, softplus_ = false;
};

}  // namespace mmlocalmamba

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<mmlocalmamba::DirectionalScan>>()}));
