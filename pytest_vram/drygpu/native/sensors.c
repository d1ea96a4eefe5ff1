/* Implements NVML's sensors: temperature, power, clocks and load.
 *
 * A dry GPU has no sensors and does no work, so every reading is a constant: that of a healthy card at rest. A program
 * that logs or checks these readings therefore runs as on a real card. No reading depends on what the program does.
 */
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };
enum {
    TEMPERATURE_C = 30,
    THROTTLE_C = 90,
    POWER_MW = 50000,
    POWER_LIMIT_MW = 300000,
    POWER_LEAST_MW = 100000,
    CORE_MHZ = 1500,
    MEMORY_MHZ = 5000,
    PCIE_GENERATION = 4,
    PCIE_WIDTH = 16,
};

typedef void *device_t;

int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *value) {
    if (sensor != 0) return INVALID_ARGUMENT; /* 0: the die, the only sensor there is */
    return (void)device, *value = TEMPERATURE_C, SUCCESS;
}

typedef struct {
    unsigned version;
    int sensor, value;
} temperature_v1;

int nvmlDeviceGetTemperatureV(device_t device, temperature_v1 *out) {
    if (out->sensor != 0) return INVALID_ARGUMENT;
    return (void)device, out->value = TEMPERATURE_C, SUCCESS;
}
int nvmlDeviceGetTemperatureThreshold(device_t device, int which, unsigned *value) {
    return (void)device, (void)which, *value = THROTTLE_C, SUCCESS;
}
int nvmlDeviceGetFanSpeed(device_t device, unsigned *percent) { return (void)device, *percent = 0, SUCCESS; }
int nvmlDeviceGetFanSpeed_v2(device_t device, unsigned fan, unsigned *percent) {
    return (void)device, (void)fan, *percent = 0, SUCCESS;
}
int nvmlDeviceGetNumFans(device_t device, unsigned *count) { return (void)device, *count = 1, SUCCESS; }

int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts) {
    return (void)device, *milliwatts = POWER_MW, SUCCESS;
}
int nvmlDeviceGetPowerManagementMode(device_t device, int *on) { return (void)device, *on = 1, SUCCESS; }
int nvmlDeviceGetPowerManagementLimit(device_t device, unsigned *milliwatts) {
    return (void)device, *milliwatts = POWER_LIMIT_MW, SUCCESS;
}
int nvmlDeviceGetPowerManagementDefaultLimit(device_t device, unsigned *milliwatts) {
    return nvmlDeviceGetPowerManagementLimit(device, milliwatts);
}
int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned *milliwatts) {
    return nvmlDeviceGetPowerManagementLimit(device, milliwatts);
}
int nvmlDeviceGetPowerManagementLimitConstraints(device_t device, unsigned *least, unsigned *most) {
    return (void)device, *least = POWER_LEAST_MW, *most = POWER_LIMIT_MW, SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(device_t device, unsigned long long *millijoules) {
    return (void)device, *millijoules = 0, SUCCESS; /* since the driver was loaded */
}
int nvmlDeviceGetPerformanceState(device_t device, int *state) { return (void)device, *state = 0, SUCCESS; }
int nvmlDeviceGetPowerState(device_t device, int *state) { return nvmlDeviceGetPerformanceState(device, state); }

int nvmlDeviceGetClockInfo(device_t device, int type, unsigned *megahertz) {
    if (type < 0 || type > 3) return INVALID_ARGUMENT; /* graphics, multiprocessors, memory, video */
    return (void)device, *megahertz = type == 2 ? MEMORY_MHZ : CORE_MHZ, SUCCESS;
}
int nvmlDeviceGetMaxClockInfo(device_t device, int type, unsigned *megahertz) {
    return nvmlDeviceGetClockInfo(device, type, megahertz);
}
int nvmlDeviceGetApplicationsClock(device_t device, int type, unsigned *megahertz) {
    return nvmlDeviceGetClockInfo(device, type, megahertz);
}
int nvmlDeviceGetDefaultApplicationsClock(device_t device, int type, unsigned *megahertz) {
    return nvmlDeviceGetClockInfo(device, type, megahertz);
}
int nvmlDeviceGetClock(device_t device, int type, int which, unsigned *megahertz) {
    return (void)which, nvmlDeviceGetClockInfo(device, type, megahertz);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(device_t device, unsigned long long *reasons) {
    return (void)device, *reasons = 1, SUCCESS; /* the card is idle */
}
int nvmlDeviceGetCurrentClocksEventReasons(device_t device, unsigned long long *reasons) {
    return nvmlDeviceGetCurrentClocksThrottleReasons(device, reasons);
}

typedef struct {
    unsigned gpu, memory;
} utilization;

int nvmlDeviceGetUtilizationRates(device_t device, utilization *out) {
    return (void)device, *out = (utilization){0, 0}, SUCCESS;
}
int nvmlDeviceGetEncoderUtilization(device_t device, unsigned *percent, unsigned *period) {
    return (void)device, *percent = 0, *period = 100000, SUCCESS;
}
int nvmlDeviceGetDecoderUtilization(device_t device, unsigned *percent, unsigned *period) {
    return nvmlDeviceGetEncoderUtilization(device, percent, period);
}

int nvmlDeviceGetPcieThroughput(device_t device, int counter, unsigned *kilobytes) {
    return (void)device, (void)counter, *kilobytes = 0, SUCCESS;
}
int nvmlDeviceGetCurrPcieLinkGeneration(device_t device, unsigned *generation) {
    return (void)device, *generation = PCIE_GENERATION, SUCCESS;
}
int nvmlDeviceGetMaxPcieLinkGeneration(device_t device, unsigned *generation) {
    return nvmlDeviceGetCurrPcieLinkGeneration(device, generation);
}
int nvmlDeviceGetCurrPcieLinkWidth(device_t device, unsigned *lanes) {
    return (void)device, *lanes = PCIE_WIDTH, SUCCESS;
}
int nvmlDeviceGetMaxPcieLinkWidth(device_t device, unsigned *lanes) {
    return nvmlDeviceGetCurrPcieLinkWidth(device, lanes);
}

/* The answers of a consumer card, which has neither error correction nor partitions. */
int nvmlDeviceGetEccMode(device_t device, int *current, int *pending) {
    return (void)device, (void)current, (void)pending, NOT_SUPPORTED;
}
int nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending) {
    return (void)device, (void)current, (void)pending, NOT_SUPPORTED;
}
int nvmlDeviceGetSerial(device_t device, char *out, unsigned room) {
    return (void)device, (void)out, (void)room, NOT_SUPPORTED;
}
int nvmlDeviceGetDisplayActive(device_t device, int *active) { return (void)device, *active = 0, SUCCESS; }
int nvmlDeviceGetDisplayMode(device_t device, int *active) { return nvmlDeviceGetDisplayActive(device, active); }
int nvmlDeviceGetMPSComputeRunningProcesses_v3(device_t device, unsigned *count, void *out) {
    return (void)device, (void)out, *count = 0, SUCCESS;
}
