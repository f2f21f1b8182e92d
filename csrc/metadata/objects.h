// The calls that a metadata pickle may ask for, each as what it does to the heap.
#pragma once

#include <string_view>

#include "metadata/heap.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

// All throw Unsupported for anything but what DCP writes.

// Whether torch's Metadata has a field of this name.
bool is_metadata_field(std::string_view name);

// Notes a field that the columns have no place for. Throws Unsupported for more of them than any torch has.
void leave_out(Heap& heap, Global type, std::string_view name);

// REDUCE: callable(*arguments).
Value call(Heap& heap, Value callable, Value arguments);

// NEWOBJ: an object of a class without its fields.
Value new_object(Heap& heap, Value type);

// BUILD for an object whose fields come in a dict, as keys and values in turns. Fields of a later torch are left out,
// but for those of Metadata.
void set_fields(Heap& heap, Value object, const Value* items, size_t count);

// BUILD for one whose fields come in a tuple. A later torch may append to it.
void set_state(Heap& heap, Value object, Value state);

}  // namespace dcp_fast::metadata
