/* Implements NVML, which nvidia-smi and pynvml call. Its device numbers ignore CUDA_VISIBLE_DEVICES. It reports only
 * this process, because every process has its own dry cards. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9
};

typedef struct {
    int index;
} *device_t;

static struct {
    int index;
} cards[DRY_MAX_DEVICES];

static device_t card(unsigned index) {
    cards[index].index = (int)index;
    return (device_t)&cards[index];
}

static size_t used(int physical) {
    for (int device = 0; device < dry_visible_count(); device++)
        if (dry_physical_index(device) == physical) return dry_used_bytes(device);
    return 0;
}

static int has_context(int physical) {
    for (int device = 0; device < dry_visible_count(); device++)
        if (dry_physical_index(device) == physical) return dry_context_exists(device);
    return 0;
}

static int copy_text(char *out, unsigned room, const char *text) {
    if (strlen(text) + 1 > room) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

static void uuid_text(int physical, char out[64]) {
    uint8_t u[16];
    dry_uuid(physical, u);
    snprintf(out, 64, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2],
             u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}

int nvmlInit_v2(void) { return dry_physical_count() ? SUCCESS : DRIVER_NOT_LOADED; }
int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlInitWithFlags(unsigned flags) { return (void)flags, nvmlInit_v2(); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int status) {
    switch (status) {
    case SUCCESS: return "Success";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    default: return "Unknown Error";
    }
}

/* The oldest driver branch that supports this CUDA. Programs compare it, so it must have the form of a version. */
#define DRIVER_VERSION (CUDART_VERSION >= 13000 ? "580.0" : "525.0")
int nvmlSystemGetDriverVersion(char *out, unsigned room) { return copy_text(out, room, DRIVER_VERSION); }
int nvmlSystemGetNVMLVersion(char *out, unsigned room) {
    return copy_text(out, room, CUDART_VERSION >= 13000 ? "13.580.0" : "12.525.0");
}
int nvmlSystemGetCudaDriverVersion(int *version) { return *version = CUDART_VERSION, SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDART_VERSION, SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) { return *count = (unsigned)dry_physical_count(), SUCCESS; }
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    if (index >= (unsigned)dry_physical_count()) return INVALID_ARGUMENT;
    *device = card(index);
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex(unsigned index, device_t *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    char mine[64];
    for (int i = 0; i < dry_physical_count(); i++) {
        uuid_text(i, mine);
        if (strcmp(mine, uuid) == 0) return *device = card((unsigned)i), SUCCESS;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *text, device_t *device) {
    unsigned domain, bus, slot;
    if (sscanf(text, "%x:%x:%x", &domain, &bus, &slot) != 3 || bus < 1 || bus > (unsigned)dry_physical_count())
        return NOT_FOUND;
    *device = card(bus - 1);
    return SUCCESS;
}
int nvmlDeviceGetHandleByPciBusId(const char *text, device_t *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(text, device);
}

int nvmlDeviceGetName(device_t device, char *out, unsigned room) {
    return (void)device, copy_text(out, room, dry_the_card()->product);
}
int nvmlDeviceGetIndex(device_t device, unsigned *index) { return *index = (unsigned)device->index, SUCCESS; }
int nvmlDeviceGetMinorNumber(device_t device, unsigned *number) { return *number = (unsigned)device->index, SUCCESS; }
int nvmlDeviceGetUUID(device_t device, char *out, unsigned room) {
    char mine[64];
    uuid_text(device->index, mine);
    return copy_text(out, room, mine);
}

int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) {
    (void)device;
    *major = dry_the_card()->major;
    *minor = dry_the_card()->minor;
    return SUCCESS;
}

typedef struct {
    char legacy_id[16];
    unsigned domain, bus, slot, device_id, subsystem_id;
    char id[32];
} pci_info;

int nvmlDeviceGetPciInfo_v3(device_t device, pci_info *info) {
    memset(info, 0, sizeof *info);
    info->bus = (unsigned)device->index + 1;
    snprintf(info->legacy_id, sizeof info->legacy_id, "0000:%02X:00.0", info->bus);
    snprintf(info->id, sizeof info->id, "00000000:%02X:00.0", info->bus);
    return SUCCESS;
}

/* ---- memory ---- */
typedef struct {
    unsigned long long total, free, used;
} memory_info;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} memory_info_v2;

int nvmlDeviceGetMemoryInfo(device_t device, memory_info *info) {
    size_t bytes = used(device->index);
    *info = (memory_info){dry_the_card()->total_bytes, dry_the_card()->total_bytes - bytes, bytes};
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(device_t device, memory_info_v2 *info) {
    size_t bytes = used(device->index);
    *info = (memory_info_v2){info->version, dry_the_card()->total_bytes, 0, dry_the_card()->total_bytes - bytes, bytes};
    return SUCCESS;
}

typedef struct {
    unsigned pid;
    unsigned long long used;
} process_v1;

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process_v2;

static int processes(device_t device, unsigned *count, unsigned *room) {
    *room = *count;
    *count = (unsigned)has_context(device->index);
    return *room < *count ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses(device_t device, unsigned *count, process_v1 *out) {
    unsigned room;
    int status = processes(device, count, &room);
    if (status == SUCCESS && *count) *out = (process_v1){(unsigned)getpid(), used(device->index)};
    return status;
}

int nvmlDeviceGetComputeRunningProcesses_v2(device_t device, unsigned *count, process_v2 *out) {
    unsigned room;
    int status = processes(device, count, &room);
    if (status == SUCCESS && *count) *out = (process_v2){(unsigned)getpid(), used(device->index), ~0u, ~0u};
    return status;
}
int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, process_v2 *out) {
    return nvmlDeviceGetComputeRunningProcesses_v2(device, count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *count, process_v2 *out) {
    return (void)device, (void)out, *count = 0, SUCCESS;
}
int nvmlDeviceGetGraphicsRunningProcesses_v2(device_t device, unsigned *count, process_v2 *out) {
    return (void)device, (void)out, *count = 0, SUCCESS;
}

/* ---- modes and links ---- */
int nvmlDeviceGetComputeMode(device_t device, int *mode) { return (void)device, *mode = 0, SUCCESS; }
int nvmlDeviceGetPersistenceMode(device_t device, int *mode) { return (void)device, *mode = 1, SUCCESS; }
int nvmlDeviceGetP2PStatus(device_t a, device_t b, int index, int *status) {
    return (void)a, (void)b, (void)index, *status = 0, SUCCESS;
}
int nvmlDeviceGetNvLinkState(device_t device, unsigned link, int *active) {
    return (void)device, (void)link, (void)active, NOT_SUPPORTED;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(device_t device, unsigned link, int *type) {
    return (void)device, (void)link, (void)type, NOT_SUPPORTED;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(device_t device, unsigned link, pci_info *info) {
    return (void)device, (void)link, (void)info, NOT_SUPPORTED;
}

/* The cards are in no fabric, which is a state and no error: torch 2.13 asks for it when it makes its first
 * expandable segment, and stops at an error. Versions 2 and 3 of the struct begin with the same fields; the low 24 bits
 * of a version are the size of its struct. */
typedef struct {
    unsigned char uuid[16];
    int status;
    unsigned clique;
    unsigned char state; /* 0: the device supports no fabric */
} fabric_info;

int nvmlDeviceGetGpuFabricInfo(device_t device, fabric_info *info) {
    return (void)device, memset(info, 0, sizeof *info), SUCCESS;
}
int nvmlDeviceGetGpuFabricInfoV(device_t device, unsigned *versioned) {
    size_t size = *versioned & 0xffffff;
    if (size < sizeof *versioned + sizeof(fabric_info) || size > 4096)
        return INVALID_ARGUMENT;
    return (void)device, memset(versioned + 1, 0, size - sizeof *versioned), SUCCESS;
}
