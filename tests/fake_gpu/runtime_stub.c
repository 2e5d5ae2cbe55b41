/* A CUDA runtime with one device that looks like an H100 and does nothing, for LD_PRELOAD.
 *
 * Only what torch calls before, around and after kernels: none is ever launched, since all tensors
 * are fake. driver_types.h comes with Triton.
 */
#include <driver_types.h>
#include <stdlib.h>
#include <string.h>

typedef void *Handle;

static long next_handle = 0x1000;

static cudaError_t new_handle(Handle *handle)
{
    *handle = (Handle)(next_handle += 16);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13020; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13020; return cudaSuccess; }

cudaError_t cudaStreamCreateWithPriority(Handle *s, unsigned f, int p) { return new_handle(s); }
cudaError_t cudaStreamCreateWithFlags(Handle *s, unsigned f) { return new_handle(s); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high)
{
    *low = 0;
    *high = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(Handle s, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamQuery(Handle s) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(Handle s) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(Handle s, Handle e, unsigned f) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(Handle s, int *state) { *state = 0; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(Handle s, int *state, unsigned long long *id)
{
    *state = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo_v2(Handle s, int *state, ...)
{
    *state = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo_v3(Handle s, int *state, ...)
{
    *state = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(int *mode) { return cudaSuccess; }

cudaError_t cudaEventCreate(Handle *e) { return new_handle(e); }
cudaError_t cudaEventCreateWithFlags(Handle *e, unsigned f) { return new_handle(e); }
cudaError_t cudaEventDestroy(Handle e) { return cudaSuccess; }
cudaError_t cudaEventRecord(Handle e, Handle s) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(Handle e, Handle s, unsigned f) { return cudaSuccess; }
cudaError_t cudaEventQuery(Handle e) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(Handle e) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, Handle a, Handle b) { *ms = 1.0f; return cudaSuccess; }

/* The first number of the compute capability: that of an H100 unless the environment has another. */
static int major(void)
{
    const char *given = getenv("FAKE_GPU_CAPABILITY");
    return given ? atoi(given) : 9;
}

static cudaError_t describe(struct cudaDeviceProp *p)
{
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->totalGlobalMem = 80UL << 30;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = major();
    p->multiProcessorCount = 132;
    p->maxThreadsPerMultiProcessor = 2048;
    p->l2CacheSize = 52428800;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) { return describe(p); }
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int d) { return describe(p); }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = major(); break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
    *free = 79UL << 30;
    *total = 80UL << 30;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device)
{
    strncpy(text, "0000:00:00.0", length);
    return cudaSuccess;
}
