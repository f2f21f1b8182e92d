#include "driver/settings.h"

#include <cstdlib>

namespace simcuda {

namespace {

constexpr double kMicro = 1e-6;
constexpr double kMilli = 1e-3;

double environment(const char* name, double otherwise) {
  const char* text = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): nobody sets it here
  return text != nullptr && *text != '\0' ? std::strtod(text, nullptr) : otherwise;
}

}  // namespace

Settings Settings::from_environment() {
  Settings settings;
  settings.devices = static_cast<int>(environment("SIMCUDA_DEVICES", settings.devices));
  settings.driver_version = static_cast<int>(environment("SIMCUDA_DRIVER_VERSION", settings.driver_version));
  settings.seed = static_cast<uint64_t>(environment("SIMCUDA_SEED", static_cast<double>(settings.seed)));
  settings.copy_gbps = environment("SIMCUDA_COPY_GBPS", settings.copy_gbps);
  settings.latency_seconds = environment("SIMCUDA_LATENCY_US", 0) * kMicro;
  settings.jitter_seconds = environment("SIMCUDA_JITTER_US", 0) * kMicro;
  const double megabytes = environment("SIMCUDA_MEMORY_MB", static_cast<double>(settings.memory_bytes >> 20));
  settings.set("memory_mb", megabytes);
  return settings;
}

bool Settings::set(const std::string& key, double value) {
  if (key == "copy_gbps") {
    copy_gbps = value;
  } else if (key == "latency_us") {
    latency_seconds = value * kMicro;
  } else if (key == "jitter_us") {
    jitter_seconds = value * kMicro;
  } else if (key == "late") {
    late = value != 0;
  } else if (key == "races") {
    races = value != 0;
  } else if (key == "memory_mb") {
    memory_bytes = static_cast<size_t>(value * 1048576);
  } else if (key == "poison") {
    poison = value != 0;
  } else if (key == "pin_ms_per_64mb") {
    pin_seconds_per_byte = value * kMilli / (64 << 20);
  } else if (key == "compile_ms") {
    compile_seconds = value * kMilli;
  } else if (key == "capturing") {
    capturing = value != 0;
  } else if (key == "seed") {
    seed = static_cast<uint64_t>(value);
  } else {
    return false;
  }
  return true;
}

}  // namespace simcuda
