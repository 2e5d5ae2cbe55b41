/* libnvidia-ml.so.1 of one healthy H100, for nvidia-ml-py's own Python.
 *
 * Structures are those of nvml.h, by which the driver's library writes. Numbers are chosen so that
 * another unit, width or member shows.
 */
#include <stdlib.h>
#include <string.h>

typedef int Return;
typedef void *Device;
typedef unsigned long long ull;
enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10 };

static int card, events;

Return nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
Return nvmlInit_v2(void) { return SUCCESS; }
Return nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(Return code) { return "of the stub"; }
static Return text(char *to, unsigned length, const char *from)
{
    strncpy(to, from, length);
    return SUCCESS;
}
static Return number(unsigned *to, unsigned value)
{
    *to = value;
    return SUCCESS;
}
Return nvmlSystemGetDriverVersion(char *v, unsigned n) { return text(v, n, "580.95.05"); }
Return nvmlSystemGetCudaDriverVersion_v2(int *v) { return number((unsigned *)v, 13020); }
Return nvmlDeviceGetCount_v2(unsigned *count) { return number(count, 1); }
Return nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device)
{
    *device = &card;
    return index == 0 ? SUCCESS : 2;
}
Return nvmlDeviceGetIndex(Device d, unsigned *index) { return number(index, d == &card ? 0 : 9); }
Return nvmlDeviceGetName(Device d, char *v, unsigned n) { return text(v, n, "NVIDIA H100 80GB HBM3"); }
Return nvmlDeviceGetUUID(Device d, char *v, unsigned n) { return text(v, n, "GPU-1234abcd-0000-1111-2222-333344445555"); }
Return nvmlDeviceGetMaxMigDeviceCount(Device d, unsigned *count) { return number(count, 1); }
Return nvmlDeviceGetMigDeviceHandleByIndex(Device d, unsigned i, Device *part) { return NOT_FOUND; }

Return nvmlDeviceGetEccMode(Device d, unsigned *now, unsigned *later)
{
    *now = *later = 1;
    return SUCCESS;
}
Return nvmlDeviceGetTotalEccErrors(Device d, unsigned kind, unsigned counter, ull *count)
{
    /* Corrected is 0, uncorrected 1; volatile 0. */
    *count = kind == 0 && counter == 0 ? 5000000002ULL : 0;
    return SUCCESS;
}
Return nvmlDeviceGetRemappedRows(Device d, unsigned *ok, unsigned *bad, unsigned *pending, unsigned *failed)
{
    *ok = 3, *bad = 1, *pending = 0, *failed = 0;
    return SUCCESS;
}
Return nvmlDeviceGetCurrentClocksEventReasons(Device d, ull *why) { *why = 1; return SUCCESS; }
Return nvmlDeviceGetClockInfo(Device d, unsigned clock, unsigned *mhz) { return number(mhz, 340 + clock); }
Return nvmlDeviceGetPowerUsage(Device d, unsigned *mw) { return number(mw, 69432); }
Return nvmlDeviceGetEnforcedPowerLimit(Device d, unsigned *mw) { return number(mw, 700000); }
Return nvmlDeviceGetPowerManagementDefaultLimit(Device d, unsigned *mw) { return number(mw, 650000); }
Return nvmlDeviceGetTotalEnergyConsumption(Device d, ull *mj) { *mj = 5000000000000ULL; return SUCCESS; }
Return nvmlDeviceGetTemperature(Device d, unsigned sensor, unsigned *c) { return number(c, 31 + sensor); }
Return nvmlDeviceGetPerformanceState(Device d, unsigned *state) { return number(state, 0); }
Return nvmlDeviceGetCurrPcieLinkGeneration(Device d, unsigned *v) { return number(v, 4); }
Return nvmlDeviceGetMaxPcieLinkGeneration(Device d, unsigned *v) { return number(v, 5); }
Return nvmlDeviceGetCurrPcieLinkWidth(Device d, unsigned *v) { return number(v, 16); }
Return nvmlDeviceGetPcieReplayCounter(Device d, unsigned *v) { return number(v, 7); }
Return nvmlDeviceGetPcieThroughput(Device d, unsigned way, unsigned *kb) { return number(kb, 1000 + way); }
Return nvmlDeviceGetNvLinkState(Device d, unsigned link, unsigned *on)
{
    *on = 1;
    return link < 18 ? SUCCESS : NOT_SUPPORTED;
}
Return nvmlDeviceGetNvLinkErrorCounter(Device d, unsigned link, unsigned counter, ull *count)
{
    *count = 10 * link + counter;
    return SUCCESS;
}

struct Utilization { unsigned gpu, memory; };
Return nvmlDeviceGetUtilizationRates(Device d, struct Utilization *u)
{
    u->gpu = 83, u->memory = 41;
    return SUCCESS;
}
struct Memory { ull total, free, used; };
Return nvmlDeviceGetMemoryInfo(Device d, struct Memory *m)
{
    m->total = 85520809984ULL, m->used = 4325376, m->free = m->total - m->used;
    return SUCCESS;
}

struct Process { unsigned pid; ull used; unsigned gpu_instance, compute_instance; };
Return nvmlDeviceGetComputeRunningProcesses_v3(Device d, unsigned *count, struct Process *p)
{
    unsigned room = *count;
    *count = 2;
    if (room < 2)
        return 7; /* insufficient size */
    p[0] = (struct Process){4242, 8589934593ULL, ~0u, ~0u};
    p[1] = (struct Process){4243, ~0ULL, ~0u, ~0u}; /* not available */
    return SUCCESS;
}

union Value { double d; int si; unsigned ui; unsigned long ul; ull ull_; long long sll; unsigned short us; };
struct Field {
    unsigned id, scope;
    long long timestamp, latency;
    unsigned type; /* 0 double, 1 unsigned, 2 unsigned long, 3 unsigned long long, 4 long long, 5 int */
    Return status;
    union Value value;
};
Return nvmlDeviceGetFieldValues(Device d, int count, struct Field *fields)
{
    for (int i = 0; i < count; i++) {
        struct Field *f = fields + i;
        f->status = SUCCESS;
        switch (f->id) {
        case 138: case 139: /* NVLINK_THROUGHPUT_DATA_TX, _RX: KiB, over all links */
            f->type = 3, f->value.ull_ = 6000000000ULL + f->id;
            if (f->scope != ~0u) f->status = NOT_SUPPORTED;
            break;
        case 230: f->type = 1, f->value.ui = 2; break; /* GET_GPU_RECOVERY_ACTION */
        default: f->status = NOT_SUPPORTED;
        }
    }
    return SUCCESS;
}

struct Event { Device device; ull type, data; unsigned gpu_instance, compute_instance; };
Return nvmlEventSetCreate(void **set) { *set = &events; return SUCCESS; }
Return nvmlDeviceRegisterEvents(Device d, ull types, void *set)
{
    events = types == 8 && set == &events; /* critical Xid errors: two of them */
    events *= 2;
    return SUCCESS;
}
Return nvmlEventSetWait_v2(void *set, struct Event *e, unsigned ms)
{
    if (!events) return TIMEOUT;
    *e = (struct Event){&card, 8, events-- == 2 ? 79 : 94, 0, 0};
    return SUCCESS;
}
