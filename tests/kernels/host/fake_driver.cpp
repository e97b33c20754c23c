// A CUDA driver without a GPU: it takes what our launcher gives it and prints each launch, one line of JSON.
//
// Built as libcuda.so.1 and put first on LD_LIBRARY_PATH; whatever else is asked of it does nothing and succeeds. The
// parameters of the kernel are two pointers, an int32 and a float, as the test passes them.
#include <cstdint>
#include <cstdio>
#include <cstring>

extern "C" {

struct Attribute { int id; char pad[4]; union { unsigned extent[3]; int flag; char bytes[64]; } value; };
struct Config { unsigned grid[3], block[3], shared; void* stream; Attribute* attributes; unsigned count; };

static int dynamic_limit;

int cuLibraryLoadData(void** library, const void* code, ...) {
    *library = (void*)0x1000;
    printf("{\"loaded\": \"%.4s\"}\n", (const char*)code);
    return 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    *kernel = (void*)0x2000;
    return library == (void*)0x1000 && !strcmp(name, "kernel") ? 0 : 500;
}
int cuKernelGetAttribute(int* value, int attribute, void*, int) {
    *value = attribute == 1 ? 1000 : 0;  // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    return 0;
}
int cuKernelSetAttribute(int attribute, int value, void*, int) {
    if (attribute == 8) dynamic_limit = value;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return 0;
}
int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void**) {
    if (function != (void*)0x2000 || (int)config->shared > dynamic_limit) return 1;
    unsigned cluster = 1, programmatic = 0;
    for (unsigned i = 0; i < config->count; i++) {
        if (config->attributes[i].id == 4) cluster = config->attributes[i].value.extent[0];
        if (config->attributes[i].id == 6) programmatic = config->attributes[i].value.flag;
    }
    printf("{\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %llu, \"cluster\": %u, "
           "\"programmatic\": %u, \"limit\": %d, \"args\": [%llu, %llu, %d, %g]}\n",
           config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1], config->block[2],
           config->shared, (unsigned long long)config->stream, cluster, programmatic, dynamic_limit,
           *(unsigned long long*)parameters[0], *(unsigned long long*)parameters[1], *(int*)parameters[2],
           *(float*)parameters[3]);
    fflush(stdout);
    return 0;
}

int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
static int nothing(...) { return 0; }
int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status);

static const struct { const char* name; void* function; } table[] = {
    {"cuGetProcAddress", (void*)cuGetProcAddress_v2},     {"cuDriverGetVersion", (void*)cuDriverGetVersion},
    {"cuLibraryLoadData", (void*)cuLibraryLoadData},      {"cuLibraryGetKernel", (void*)cuLibraryGetKernel},
    {"cuKernelGetAttribute", (void*)cuKernelGetAttribute}, {"cuKernelSetAttribute", (void*)cuKernelSetAttribute},
    {"cuLaunchKernelEx", (void*)cuLaunchKernelEx},
};
int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
    *function = (void*)nothing;
    for (auto& entry : table)
        if (!strcmp(symbol, entry.name)) *function = entry.function;
    if (status) *status = 0;
    return 0;
}
}
