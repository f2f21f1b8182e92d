# Finds doctest, the one header that native tests are written with, for target dcp_fast_doctest.
if(NOT TARGET dcp_fast_doctest)
  # A given path comes first, then build/, where a copy travels to machines without a network, then the system's.
  find_path(DOCTEST_INCLUDE doctest/doctest.h
    HINTS ENV DOCTEST_INCLUDE ${CMAKE_CURRENT_LIST_DIR}/../build
    DOC "The folder that has doctest/doctest.h")
  if(NOT DOCTEST_INCLUDE)
    message(FATAL_ERROR "The native tests need doctest: install it (Debian, Ubuntu: apt-get install doctest-dev), or "
                        "give the folder that has doctest/doctest.h as -DDOCTEST_INCLUDE or DOCTEST_INCLUDE")
  endif()
  add_library(dcp_fast_doctest INTERFACE)
  target_include_directories(dcp_fast_doctest SYSTEM INTERFACE ${DOCTEST_INCLUDE})
endif()
