// The operator `_scratchbn_batch_norm`, registered through MXNet's extension interface: on a CPU the
// arithmetic is that of batch_norm.h, on a GPU that of cuda/batch_norm.cu.
//
// Inputs: data; gamma, beta, running_mean, running_var, shape (C,); flag, shape (1,), 1 in
// inference and anything else in training; num_batches, shape (1,), if `momentum` is None.
// Outputs: the normalized data; what the backward needs, shape (3, C); a token, shape (C,), that
// exists once the running statistics were moved.
//
// Attributes come as Python writes them: True and False, None, numbers; `relu` may be "Activation",
// which is MXNet's operator of that name.
//
// MXNet 1.9.1 copies the shapes of the inputs into a buffer that it sizes by the sum of their
// ranks, where an unknown shape counts -1: with some known and some unknown it writes past the end.
// So it is shown one input, data; the others must be declared as "extra" inputs, whose shapes and
// types it does not infer. `_operator.py` does both; `check` is what is left to do here.
//
// Errors carry no text: MXNet's store of error messages is not thread-safe. What a GPU's driver says
// goes to the standard error stream.

#include <locale.h>
#include <mxnet/lib_api.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "batch_norm.h"
#include "cuda/launch.h"

namespace {

using mxnet::ext::MX_FAIL;
using mxnet::ext::MX_SUCCESS;
using mxnet::ext::MXReturnValue;
using mxnet::ext::MXTensor;
using mxnet::ext::OpResource;
using Attributes = std::unordered_map<std::string, std::string>;
using Shape = std::vector<unsigned>;

constexpr unsigned kUnknown = -1u;  // a size that MXNet does not know yet

enum Tensor {
  kData, kGamma, kBeta, kRunningMean, kRunningVar, kFlag, kNumBatches,  // inputs
  kOut = 0, kSaved, kToken, kOutputs                                    // outputs
};

void require(bool condition) {
  if (!condition) throw std::invalid_argument("");
}

int integer(const std::string& text) {
  int value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  require(error == std::errc() && stop == end);
  return value;
}

double number(const std::string& text) {  // the same in every locale
  static const locale_t plain = newlocale(LC_ALL_MASK, "C", nullptr);
  char* stop = nullptr;
  const double value = strtod_l(text.c_str(), &stop, plain);
  require(!text.empty() && *stop == '\0' && std::isfinite(value));
  return value;
}

bool truth(const std::string& text) {
  require(text == "True" || text == "False");
  return text == "True";
}

struct Options {
  explicit Options(const Attributes& attributes)
      : axis(integer(attributes.at("axis"))),
        epsilon(number(attributes.at("epsilon"))),
        cumulative(attributes.at("momentum") == "None"),
        momentum(cumulative ? 0 : number(attributes.at("momentum"))),
        scale(truth(attributes.at("scale"))),
        center(truth(attributes.at("center"))),
        activation(attributes.at("relu") == "Activation"),
        relu(activation || truth(attributes.at("relu"))),
        unbiased(truth(attributes.at("unbiased_variance"))),
        half(attributes.count("half") && truth(attributes.at("half"))) {}

  int inputs() const { return cumulative ? kNumBatches + 1 : kFlag + 1; }

  int axis;
  double epsilon;
  bool cumulative;
  double momentum;
  bool scale, center, activation, relu, unbiased;
  bool half;  // whether float16 data is taken, which on a CPU is cast before
};

// Calls f(options), and fails if it, or the options, throw: no exception may reach MXNet's threads.
template <typename F>
MXReturnValue with_options(const Attributes& attributes, F f) {
  try {
    f(Options(attributes));
  } catch (const std::exception&) {
    return MX_FAIL;
  }
  return MX_SUCCESS;
}

MXReturnValue parse_attributes(const Attributes& attributes, int* inputs, int* outputs) {
  return with_options(attributes, [&](const Options& options) {
    *inputs = 1;
    *outputs = kOutputs;
    require(integer(attributes.at(MX_STR_EXTRA_INPUTS)) == options.inputs() - 1);
  });
}

// The type of everything but the data and the output.
int statistics_type(int type) {
  return type == mxnet::ext::kFloat16 ? int(mxnet::ext::kFloat32) : type;
}

MXReturnValue infer_type(const Attributes& attributes, std::vector<int>* in,
                         std::vector<int>* out) {
  return with_options(attributes, [&](const Options& options) {
    int& type = in->front();  // where it is none of these, MXNet reports that float32 was expected
    const bool half = options.half && type == mxnet::ext::kFloat16;
    if (type != -1 && type != mxnet::ext::kFloat64 && !half) type = mxnet::ext::kFloat32;
    out->assign(kOutputs, statistics_type(type));
    (*out)[kOut] = type;
  });
}

// The position of the channel axis in a shape of `rank` axes.
size_t channel_axis(const Options& options, size_t rank) {
  const int axis = options.axis < 0 ? options.axis + int(rank) : options.axis;
  require(rank >= 2 && 0 <= axis && axis < int(rank));
  return size_t(axis);
}

MXReturnValue infer_shape(const Attributes& attributes, std::vector<Shape>* in,
                          std::vector<Shape>* out) {
  return with_options(attributes, [&](const Options& options) {
    const Shape& data = in->front();
    const unsigned channels = data[channel_axis(options, data.size())];
    for (const unsigned size : data) require(size != kUnknown);
    (*out)[kOut] = data;
    (*out)[kSaved] = {3, channels};
    (*out)[kToken] = {channels};
  });
}

MXReturnValue mutated_inputs(const Attributes& attributes, std::vector<int>* indices) {
  return with_options(attributes, [&](const Options& options) {
    *indices = {kRunningMean, kRunningVar};
    if (options.cumulative) indices->push_back(kNumBatches);
  });
}

scratchbn::View view_of(const MXTensor& data, const Options& options) {
  scratchbn::View view{1, 1, 1};
  const size_t axis = channel_axis(options, data.shape.size());
  for (size_t i = 0; i < data.shape.size(); ++i) {
    (i < axis ? view.L : i == axis ? view.C : view.S) *= data.shape[i];
  }
  return view;
}

// What MXNet was not shown: the shapes and types of the inputs but data.
void check(const Options& options, const MXTensor* in) {
  const int64_t channels = view_of(in[kData], options).C;
  for (int i = kGamma; i < options.inputs(); ++i) {
    require(in[i].shape == std::vector<int64_t>{i < kFlag ? channels : 1});
    require(in[i].dtype ==
            (i == kFlag ? int(mxnet::ext::kFloat32) : statistics_type(in[kData].dtype)));
  }
}

// MXNet's Activation hides NaN where oneDNN computes it: float32 with 1, 2 or 4 axes.
template <typename T>
scratchbn::Relu relu_of(const Options& options, size_t rank) {
  if (!options.relu) return scratchbn::Relu::kNone;
  const bool by_onednn = std::is_same_v<T, float> && (rank == 2 || rank == 4);
  return options.activation && by_onednn ? scratchbn::Relu::kActivation : scratchbn::Relu::kRelu;
}

template <typename T>
scratchbn::Layer<T> layer_of(const Options& options, MXTensor* in) {
  check(options, in);
  return {view_of(in[kData], options),
          options.epsilon,
          relu_of<T>(options, in[kData].shape.size()),
          in[kData].data<T>(),
          options.scale ? in[kGamma].data<T>() : nullptr,
          options.center ? in[kBeta].data<T>() : nullptr};
}

template <typename T>
scratchbn::Saved<T> saved_in(MXTensor& tensor, int64_t channels) {
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
  const size_t channels = mean.size();
  for (size_t c = 0; c < channels; ++c) {
    if (!std::isfinite(mean[c]) || !std::isfinite(T(variance[c] * unbiased))) return;
  }
  const double keep = options.cumulative ? 1 - 1 / (double(*count) + 1) : options.momentum;
  for (size_t c = 0; c < channels; ++c) {
    running_mean[c] = T(keep * running_mean[c] + (1 - keep) * mean[c]);
    running_var[c] = T(keep * running_var[c] + (1 - keep) * (variance[c] * unbiased));
  }
  if (options.cumulative) *count += 1;
}

template <typename T>
void forward(const Options& options, MXTensor* in, MXTensor* out) {
  const scratchbn::Layer<T> layer = layer_of<T>(options, in);
  const int64_t channels = layer.view.C;
  const auto saved = saved_in<T>(out[kSaved], channels);
  T *running_mean = in[kRunningMean].data<T>(), *running_var = in[kRunningVar].data<T>();
  T* y = out[kOut].data<T>();
  std::fill_n(out[kToken].data<T>(), channels, T(1));
  if (*in[kFlag].data<float>() == 1 || layer.view.empty()) {
    scratchbn::infer(layer, saved, y, running_mean, running_var);
    return;
  }
  std::vector<T> mean(static_cast<size_t>(channels)), variance(mean.size());
  scratchbn::train(layer, saved, y, mean.data(), variance.data());
  T* count = options.cumulative ? in[kNumBatches].data<T>() : nullptr;
  move_averages(options, layer.view, mean, variance, running_mean, running_var, count);
}

// Inputs: the gradients of the outputs, then the inputs and the outputs of the forward.
template <typename T>
void backward(const Options& options, MXTensor* gradients, MXTensor* out) {
  MXTensor* in = gradients + kOutputs;
  const scratchbn::Layer<T> layer = layer_of<T>(options, in);
  const int64_t channels = layer.view.C;
  const auto saved = saved_in<T>(in[options.inputs() + kSaved], channels);
  T *dgamma = out[kGamma].data<T>(), *dbeta = out[kBeta].data<T>();
  const bool trained = *in[kFlag].data<float>() != 1, empty = layer.view.empty();
  if (!empty) {
    scratchbn::backward(layer, saved, trained, gradients[kOut].data<T>(), out[kData].data<T>(),
                        dgamma, dbeta);
  }
  if (dgamma && (empty || !options.scale)) std::fill_n(dgamma, channels, T(0));
  if (dbeta && (empty || !options.center)) std::fill_n(dbeta, channels, T(0));
}

template <bool is_forward>
MXReturnValue compute(const Attributes& attributes, std::vector<MXTensor>* in,
                      std::vector<MXTensor>* out, const OpResource&) {
  return with_options(attributes, [&](const Options& options) {
    MXTensor *from = in->data(), *to = out->data();
    require(from->dtype != mxnet::ext::kFloat16);
    const bool single = from->dtype == mxnet::ext::kFloat32;
    if (is_forward) {
      single ? forward<float>(options, from, to) : forward<double>(options, from, to);
    } else {
      single ? backward<float>(options, from, to) : backward<double>(options, from, to);
    }
  });
}

// --- on a GPU ----------------------------------------------------------------------------------

// The sizes, options and inputs of a call.
scratchbn_gpu::Call call_of(const Options& options, const MXTensor* in) {
  check(options, in);
  const scratchbn::View view = view_of(in[kData], options);
  scratchbn_gpu::Launcher::check_sizes(view.L, view.C, view.S);
  scratchbn_gpu::Call call{};
  call.L = int(view.L), call.C = int(view.C), call.S = int(view.S);
  call.relu = options.relu, call.cumulative = options.cumulative, call.unbiased = options.unbiased;
  call.epsilon = options.epsilon, call.momentum = options.momentum;
  call.x = in[kData].data_ptr;
  call.gamma = options.scale ? in[kGamma].data_ptr : nullptr;
  call.beta = options.center ? in[kBeta].data_ptr : nullptr;
  call.running_mean = in[kRunningMean].data_ptr, call.running_var = in[kRunningVar].data_ptr;
  call.num_batches = options.cumulative ? in[kNumBatches].data_ptr : nullptr;
  call.flag = static_cast<const float*>(in[kFlag].data_ptr);
  return call;
}

scratchbn_gpu::Type type_of(const MXTensor& data) {
  if (data.dtype == mxnet::ext::kFloat16) return scratchbn_gpu::kHalf;
  return data.dtype == mxnet::ext::kFloat32 ? scratchbn_gpu::kSingle : scratchbn_gpu::kDouble;
}

template <bool is_forward>
MXReturnValue compute_on_gpu(const Attributes& attributes, std::vector<MXTensor>* inputs,
                             std::vector<MXTensor>* outputs, const OpResource& resource) {
  return with_options(attributes, [&](const Options& options) {
    MXTensor *in = inputs->data() + (is_forward ? 0 : int(kOutputs)), *out = outputs->data();
    try {
      scratchbn_gpu::Call call = call_of(options, in);
      if (call.C == 0) return;
      if (is_forward) {
        call.y = out[kOut].data_ptr, call.kept = out[kSaved].data_ptr;
        call.token = out[kToken].data_ptr;
      } else {
        call.kept = in[options.inputs() + kSaved].data_ptr;
        call.dy = inputs->front().data_ptr;
        call.dx = out[kData].data_ptr;
        call.dgamma = out[kGamma].data_ptr, call.dbeta = out[kBeta].data_ptr;
      }
      const scratchbn_gpu::Place place{in->ctx.dev_id, resource.get_cuda_stream(),
                                       [&](int bytes) { return resource.alloc_gpu(bytes); }};
      scratchbn_gpu::Launcher launcher(call, type_of(*in), place);
      is_forward ? launcher.forward() : launcher.backward();
    } catch (const scratchbn_gpu::DriverError& error) {
      std::fprintf(stderr, "scratchbn on gpu(%d): %s\n", in->ctx.dev_id, error.what());
      throw;
    }
  });
}

}  // namespace

// Hands over the code of the kernels for cards of a compute capability, 86 for 8.6.
extern "C" void scratchbn_gpu_add_image(int capability, const void* data, size_t size) {
  scratchbn_gpu::Images::get().add(capability, data, size);
}

// Loads the kernels into a device. Returns 0, or 1 with the reason in `reason`.
extern "C" int scratchbn_gpu_open(int device, char* reason, size_t size) {
  try {
    scratchbn_gpu::Device::get(device);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(reason, size, "%s", error.what());
    return 1;
  }
}

REGISTER_OP(_scratchbn_batch_norm)
    .setForward(compute<true>, "cpu")
    .setBackward(compute<false>, "cpu")
    .setForward(compute_on_gpu<true>, "gpu")
    .setBackward(compute_on_gpu<false>, "gpu")
    .setParseAttrs(parse_attributes)
    .setInferType(infer_type)
    .setInferShape(infer_shape)
    .setMutateInputs(mutated_inputs);

MXReturnValue initialize(int mxnet_version) {
  return mxnet_version >= 10900 ? MX_SUCCESS : MX_FAIL;
}
