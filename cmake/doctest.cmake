# Finds doctest, the one header that native tests are written with; dcp_fast_doctest is that and the main program.
if(NOT TARGET dcp_fast_doctest)
  # A given path comes first, then build/, where a copy travels to machines without a network, then the system's.
  find_path(DOCTEST_INCLUDE doctest/doctest.h
    HINTS ENV DOCTEST_INCLUDE ${CMAKE_CURRENT_LIST_DIR}/../build
    DOC "The folder that has doctest/doctest.h")
  if(NOT DOCTEST_INCLUDE)
    message(FATAL_ERROR "The native tests need doctest: install it (Debian, Ubuntu: apt-get install doctest-dev), or "
                        "give the folder that has doctest/doctest.h as -DDOCTEST_INCLUDE or DOCTEST_INCLUDE")
  endif()
  # Compiled once for all programs: it is most of doctest.
  add_library(dcp_fast_doctest STATIC ${CMAKE_CURRENT_LIST_DIR}/../tests/native/main.cpp)
  target_include_directories(dcp_fast_doctest SYSTEM PUBLIC ${DOCTEST_INCLUDE})
  # An assertion is one call, which compiles in less time.
  target_compile_definitions(dcp_fast_doctest PUBLIC DOCTEST_CONFIG_SUPER_FAST_ASSERTS)
endif()

# Headers that most tests of a program include are read once.
function(dcp_fast_precompile_test_headers target)
  target_precompile_headers(${target} PRIVATE <doctest/doctest.h> <algorithm> <atomic> <chrono> <cstdint> <cstring>
                            <filesystem> <functional> <memory> <mutex> <optional> <random> <string> <string_view>
                            <thread> <unordered_map> <utility> <vector>)
endfunction()
