// A stand-in for NVRTC, the compiler of the few kernels that torch writes as it runs (erfinv):
// everything compiles, to nothing. The real one ends at a signal without a real driver.
#include <nvrtc.h>

#include <cstdlib>
#include <cstring>

extern "C" {

nvrtcResult nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return NVRTC_SUCCESS;
}

const char* nvrtcGetErrorString(nvrtcResult) { return "an error of the stand-in"; }

nvrtcResult nvrtcCreateProgram(nvrtcProgram* program, const char*, const char*, int,
                               const char* const*, const char* const*) {
  *program = static_cast<nvrtcProgram>(std::calloc(1, 64));
  return *program != nullptr ? NVRTC_SUCCESS : NVRTC_ERROR_OUT_OF_MEMORY;
}

nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
  std::free(*program);
  *program = nullptr;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetLoweredName(nvrtcProgram, const char* const, const char** lowered) {
  *lowered = "kernel";
  return NVRTC_SUCCESS;
}

// Logs and machine code: one byte, the end of a text.
nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram, size_t* bytes) {
  *bytes = 1;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetProgramLog(nvrtcProgram, char* log) {
  *log = '\0';
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t* bytes) {
  return nvrtcGetProgramLogSize(program, bytes);
}

nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char* code) {
  return nvrtcGetProgramLog(program, code);
}

nvrtcResult nvrtcGetPTXSize(nvrtcProgram program, size_t* bytes) {
  return nvrtcGetProgramLogSize(program, bytes);
}

nvrtcResult nvrtcGetPTX(nvrtcProgram program, char* code) {
  return nvrtcGetProgramLog(program, code);
}

}  // extern "C"
