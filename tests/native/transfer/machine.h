// Files by which the system describes a machine, below a folder of their own.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "temp_dir.h"

namespace dcp_fast::testing {

struct Machine {
  TempDir folder;

  std::string root() const { return folder.path("root"); }
  void write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root() + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
};

}  // namespace dcp_fast::testing
