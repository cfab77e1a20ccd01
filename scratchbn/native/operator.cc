// The operator `_scratchbn_batch_norm`, registered through MXNet's extension interface.
//
// Inputs: data; gamma, beta, running_mean, running_var, shape (C,); flag, shape (1,), 1 in
// inference and anything else in training; num_batches, shape (1,), if `momentum` is None.
// Outputs: what data becomes; what the backward needs, shape (3, C); a token, shape (C,), that
// exists once the running statistics were moved.
//
// Errors carry no text of their own: the interface keeps texts in one vector that a thread that
// computes may read while another adds to it.

#include <mxnet/lib_api.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <unordered_map>
#include <vector>

#include "batch_norm.h"

namespace {

using mxnet::ext::MX_FAIL;
using mxnet::ext::MX_SUCCESS;
using mxnet::ext::MXReturnValue;
using mxnet::ext::MXTensor;
using mxnet::ext::OpResource;
using Attributes = std::unordered_map<std::string, std::string>;

enum Input { kData, kGamma, kBeta, kRunningMean, kRunningVar, kFlag, kNumBatches };
enum Output { kOut, kKept, kToken, kOutputs };

struct Options {
  explicit Options(const Attributes& attributes)
      : axis(std::stoi(attributes.at("axis"))),
        epsilon(std::stod(attributes.at("epsilon"))),
        cumulative(attributes.at("momentum") == "None"),
        momentum(cumulative ? 0 : std::stod(attributes.at("momentum"))),
        scale(attributes.at("scale") == "True"),
        center(attributes.at("center") == "True"),
        relu(attributes.at("relu") == "True"),
        unbiased(attributes.at("unbiased_variance") == "True") {}

  int inputs() const { return cumulative ? kNumBatches + 1 : kFlag + 1; }

  int axis;
  double epsilon;
  bool cumulative;
  double momentum;
  bool scale, center, relu, unbiased;
};

MXReturnValue parse_attributes(const Attributes& attributes, int* inputs, int* outputs) {
  *inputs = Options(attributes).inputs();
  *outputs = kOutputs;
  return MX_SUCCESS;
}

MXReturnValue infer_type(const Attributes&, std::vector<int>* in, std::vector<int>* out) {
  int type = -1;
  for (int i = int(in->size()); i-- > 0;) {  // the parameters before the data
    if (i != kFlag && type == -1) type = (*in)[i];
  }
  if (type != -1 && type != mxnet::ext::kFloat32 && type != mxnet::ext::kFloat64) return MX_FAIL;
  in->assign(in->size(), type);  // MXNet reports an input of another type
  (*in)[kFlag] = mxnet::ext::kFloat32;
  out->assign(kOutputs, type);
  return MX_SUCCESS;
}

MXReturnValue infer_shape(const Attributes& attributes, std::vector<std::vector<unsigned>>* in,
                          std::vector<std::vector<unsigned>>* out) {
  const Options options(attributes);
  const std::vector<unsigned>& data = (*in)[kData];
  const int rank = int(data.size());
  if (rank < 2 || options.axis < -rank || options.axis >= rank) return MX_FAIL;
  const unsigned channels = data[options.axis < 0 ? options.axis + rank : options.axis];
  for (int i = kGamma; i <= kRunningVar; ++i) (*in)[i] = {channels};
  for (int i = kFlag; i < options.inputs(); ++i) (*in)[i] = {1};
  (*out)[kOut] = data;
  (*out)[kKept] = {3, channels};
  (*out)[kToken] = {channels};
  return MX_SUCCESS;
}

MXReturnValue mutated_inputs(const Attributes& attributes, std::vector<int>* indices) {
  *indices = {kRunningMean, kRunningVar};
  if (Options(attributes).cumulative) indices->push_back(kNumBatches);
  return MX_SUCCESS;
}

scratchbn::View view_of(const MXTensor& data, int axis) {
  scratchbn::View view{1, 1, 1};
  const int rank = int(data.shape.size()), channel = axis < 0 ? axis + rank : axis;
  for (int i = 0; i < rank; ++i) {
    (i < channel ? view.L : i == channel ? view.C : view.S) *= data.shape[i];
  }
  return view;
}

template <typename T>
scratchbn::Layer<T> layer_of(const Options& options, std::vector<MXTensor>& tensors, int first) {
  return {view_of(tensors[first + kData], options.axis),
          options.epsilon,
          options.relu,
          tensors[first + kData].data<T>(),
          options.scale ? tensors[first + kGamma].data<T>() : nullptr,
          options.center ? tensors[first + kBeta].data<T>() : nullptr};
}

template <typename T>
scratchbn::Normalizer<T> kept_in(MXTensor& tensor, int64_t channels) {
  T* p = tensor.data<T>();
  return {p, p + channels, p + 2 * channels};
}

// Section 3.1 of the paper: the moving averages. A batch whose statistics are not all finite
// leaves them as they are.
template <typename T>
void move_averages(const Options& options, const scratchbn::View& view,
                   const std::vector<T>& mean, const std::vector<T>& variance, T* running_mean,
                   T* running_var, T* count) {
  const double m = double(view.m());
  const double unbiased = options.unbiased ? m / (m - 1) : 1;
  for (int64_t c = 0; c < view.C; ++c) {
    if (!std::isfinite(mean[c]) || !std::isfinite(T(variance[c] * unbiased))) return;
  }
  const double keep = options.cumulative ? 1 - 1 / (double(*count) + 1) : options.momentum;
  for (int64_t c = 0; c < view.C; ++c) {
    running_mean[c] = T(keep * running_mean[c] + (1 - keep) * mean[c]);
    running_var[c] = T(keep * running_var[c] + (1 - keep) * (variance[c] * unbiased));
  }
  if (options.cumulative) *count += 1;
}

template <typename T>
void forward(const Options& options, std::vector<MXTensor>& in, std::vector<MXTensor>& out) {
  const scratchbn::Layer<T> layer = layer_of<T>(options, in, 0);
  const int64_t channels = layer.view.C;
  const auto kept = kept_in<T>(out[kKept], channels);
  T *running_mean = in[kRunningMean].data<T>(), *running_var = in[kRunningVar].data<T>();
  T* y = out[kOut].data<T>();
  std::fill_n(out[kToken].data<T>(), channels, T(1));
  if (*in[kFlag].data<float>() == 1 || layer.view.m() == 0) {
    scratchbn::infer(layer, kept, y, running_mean, running_var);
    return;
  }
  std::vector<T> mean(channels), variance(channels);
  scratchbn::train(layer, kept, y, mean.data(), variance.data());
  T* count = options.cumulative ? in[kNumBatches].data<T>() : nullptr;
  move_averages(options, layer.view, mean, variance, running_mean, running_var, count);
}

// Inputs: the gradients of the outputs, then the inputs and the outputs of the forward.
template <typename T>
void backward(const Options& options, std::vector<MXTensor>& in, std::vector<MXTensor>& out) {
  const scratchbn::Layer<T> layer = layer_of<T>(options, in, kOutputs);
  const auto kept = kept_in<T>(in[kOutputs + options.inputs() + kKept], layer.view.C);
  T *dgamma = out[kGamma].data<T>(), *dbeta = out[kBeta].data<T>();
  const bool trained = *in[kOutputs + kFlag].data<float>() != 1;
  if (layer.view.m() > 0) {
    scratchbn::backward(layer, kept, trained, in[kOut].data<T>(), out[kData].data<T>(), dgamma,
                        dbeta);
  }
  const bool none = layer.view.m() == 0;
  if (dgamma && (none || !options.scale)) std::fill_n(dgamma, layer.view.C, T(0));
  if (dbeta && (none || !options.center)) std::fill_n(dbeta, layer.view.C, T(0));
}

template <bool is_forward>
MXReturnValue compute(const Attributes& attributes, std::vector<MXTensor>* in,
                      std::vector<MXTensor>* out, const OpResource&) {
  const Options options(attributes);
  const bool single = in->front().dtype == mxnet::ext::kFloat32;
  if (is_forward) {
    single ? forward<float>(options, *in, *out) : forward<double>(options, *in, *out);
  } else {
    single ? backward<float>(options, *in, *out) : backward<double>(options, *in, *out);
  }
  return MX_SUCCESS;
}

}  // namespace

REGISTER_OP(_scratchbn_batch_norm)
    .setForward(compute<true>, "cpu")
    .setBackward(compute<false>, "cpu")
    .setParseAttrs(parse_attributes)
    .setInferType(infer_type)
    .setInferShape(infer_shape)
    .setMutateInputs(mutated_inputs);

MXReturnValue initialize(int mxnet_version) {
  return mxnet_version >= 10900 ? MX_SUCCESS : MX_FAIL;
}
