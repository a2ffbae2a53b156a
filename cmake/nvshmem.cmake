# Decides by DEEP_A2A_NVSHMEM whether _nvshmem is built, and adds a line about it to backends.txt. Sets
# DEEP_A2A_HAS_NVSHMEM and the target deep_a2a_nvshmem: headers, device code, and the host library by its soname alone.
string(TOUPPER "${DEEP_A2A_NVSHMEM}" nvshmem_wish)
if(NOT nvshmem_wish MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "DEEP_A2A_NVSHMEM must be ON, OFF or AUTO, got ${DEEP_A2A_NVSHMEM}")
endif()

set(DEEP_A2A_HAS_NVSHMEM OFF)
set(missing "")
if(nvshmem_wish STREQUAL "OFF")
  set(missing "DEEP_A2A_NVSHMEM=OFF")
elseif(NOT DEEP_A2A_HAS_CUDA)
  set(missing "it needs the CUDA backend")
else()
  set(nvshmem_dir "${DEEP_A2A_NVSHMEM_DIR}")
  set(nvshmem_wheel "nvidia-nvshmem-cu${CUDAToolkit_VERSION_MAJOR}")
  if(NOT nvshmem_dir AND DEEP_A2A_PYTHON)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
    # The folder is the same for all versions of CUDA: the wheel's name tells.
    execute_process(
      COMMAND
        "${Python_EXECUTABLE}" -c
        "import importlib.metadata as m; d = m.distribution('${nvshmem_wheel}'); print(d.locate_file('nvidia/nvshmem'))"
      OUTPUT_VARIABLE nvshmem_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(NOT nvshmem_dir)
    set(missing "${nvshmem_wheel} is not installed")
  elseif(NOT EXISTS "${nvshmem_dir}/lib/libnvshmem_device.a" OR NOT EXISTS "${nvshmem_dir}/include/nvshmem.h")
    set(missing "${nvshmem_dir} has no include/nvshmem.h and lib/libnvshmem_device.a")
  else()
    set(DEEP_A2A_HAS_NVSHMEM ON)
  endif()
endif()

if(DEEP_A2A_HAS_NVSHMEM)
  file(STRINGS "${nvshmem_dir}/include/non_abi/nvshmem_version.h" nvshmem_version REGEX "VENDOR_(MAJOR|MINOR|PATCH)")
  string(REGEX MATCHALL "[0-9]+" nvshmem_version "${nvshmem_version}")
  list(JOIN nvshmem_version "." nvshmem_version)
  add_library(deep_a2a_nvshmem INTERFACE)
  target_include_directories(deep_a2a_nvshmem SYSTEM INTERFACE "${nvshmem_dir}/include")
  if(CUDAToolkit_VERSION_MAJOR GREATER_EQUAL 13)  # where CUDA's C++ library has moved to
    foreach(dir IN LISTS CUDAToolkit_INCLUDE_DIRS)
      target_include_directories(deep_a2a_nvshmem SYSTEM INTERFACE "${dir}/cccl")
    endforeach()
  endif()
  # By soname and without a path: Python has loaded the library of the installed wheel, or of whoever uses it already, and
  # the loader takes that one. Were it not named at all, its symbols would have to be global in the process, which those of
  # a library that somebody else has loaded need not be.
  target_link_libraries(deep_a2a_nvshmem INTERFACE "${nvshmem_dir}/lib/libnvshmem_device.a"
                                                   "${nvshmem_dir}/lib/libnvshmem_host.so.3")
  set(found "_nvshmem with NVSHMEM ${nvshmem_version}")
elseif(nvshmem_wish STREQUAL "ON")
  message(FATAL_ERROR "DEEP_A2A_NVSHMEM=ON, but ${missing}: pip install ${nvshmem_wheel}==3.4.5, or set "
                      "DEEP_A2A_NVSHMEM_DIR")
else()
  set(found "without _nvshmem (${missing}): one node only")
endif()
message(STATUS "deep_a2a: ${found}")
file(APPEND "${CMAKE_BINARY_DIR}/backends.txt" "deep_a2a: ${found}\n")
