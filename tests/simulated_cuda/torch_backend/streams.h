// The state that torch keeps for each thread: its current device, and its current stream on every device.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstddef>

namespace torch_backend {

c10::DeviceIndex current_device();

// Makes a device current on this thread and returns the one before it.
c10::DeviceIndex exchange_device(c10::DeviceIndex device);

c10::Stream current_stream(c10::DeviceIndex device);

// Makes a stream current on its device and returns the one before it.
c10::Stream exchange_stream(c10::Stream stream);

c10::Stream default_stream(c10::DeviceIndex device);

// A stream of the device's pool. As in torch they are lent in turn and never destroyed.
c10::Stream pool_stream(c10::DeviceIndex device);

// How many streams the pools of all devices hold.
size_t pool_size();

void synchronize_stream(c10::Stream stream);
void synchronize_device(c10::DeviceIndex device);

}  // namespace torch_backend
