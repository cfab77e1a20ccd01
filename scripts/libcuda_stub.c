/* A libcuda.so.1 for machines without the NVIDIA driver: the ten functions that libmxnet.so of
 * mxnet-cu112 1.9.1 imports from it, so that it can be loaded. Each says that there is no device.
 *
 *     cc -shared -fPIC -Wl,-soname,libcuda.so.1 libcuda_stub.c -o libcuda.so.1
 */

enum { CUDA_ERROR_NO_DEVICE = 100 };

/* The callers' arguments are left in registers and on the caller's stack, unread. */
#define NO_DEVICE(name) int name(void) { return CUDA_ERROR_NO_DEVICE; }

NO_DEVICE(cuDeviceGet)
NO_DEVICE(cuDevicePrimaryCtxRetain)
NO_DEVICE(cuGetErrorString)
NO_DEVICE(cuGraphKernelNodeGetParams)
NO_DEVICE(cuGraphNodeGetType)
NO_DEVICE(cuLaunchKernel)
NO_DEVICE(cuModuleGetFunction)
NO_DEVICE(cuModuleLoadData)
NO_DEVICE(cuModuleLoadDataEx)
NO_DEVICE(cuModuleUnload)
