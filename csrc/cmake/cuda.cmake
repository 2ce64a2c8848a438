# Decides whether came8bit/_C_cuda is built, with which nvcc and for which GPUs, and declares it.
#
# CAME8BIT_CUDA, from the command line or the environment:
#   AUTO          (default) build it where torch is a CUDA build and a fitting nvcc is found; otherwise say
#                 why not and go on: the package then works on CUDA tensors without it, slowly
#   ON            fail where it cannot be built
#   OFF           do not build it
#   compile-only  compile for every architecture whatever torch is, report registers, install nothing
#   release       compile for every architecture whatever torch is, and install: for wheels
#
# The library uses torch's stable ABI and, of libtorch_cuda, the C functions in torch_cuda_stub.cpp alone.
# It is linked against that stub, so a CPU build of torch is enough to compile it; opening it there fails for
# want of libtorch_cuda.so, and came8bit/ops/libraries.py does not even try.
include_guard()
include("${CMAKE_CURRENT_LIST_DIR}/cuda_choice.cmake")

if(NOT DEFINED CAME8BIT_CUDA)
  set(CAME8BIT_CUDA "$ENV{CAME8BIT_CUDA}")
endif()
if(CAME8BIT_CUDA STREQUAL "")
  set(CAME8BIT_CUDA AUTO)
endif()
if(NOT CAME8BIT_CUDA MATCHES "^(AUTO|ON|OFF|compile-only|release)$")
  message(FATAL_ERROR "CAME8BIT_CUDA: got '${CAME8BIT_CUDA}', expected AUTO, ON, OFF, compile-only or release")
endif()

# What came8bit/ops/libraries.py tells about a library that is not there: a file in the wheel's metadata.
function(came8bit_note_cuda built reason)
  set(note "${CMAKE_CURRENT_BINARY_DIR}/came8bit-cuda.json")
  foreach(text reason CMAKE_CUDA_COMPILER_VERSION came8bit_cuda_names)
    string(REPLACE "\\" "\\\\" ${text} "${${text}}")
    string(REPLACE "\"" "\\\"" ${text} "${${text}}")
  endforeach()
  set(needs_nvcc false)
  if(came8bit_nvcc_problem)
    set(needs_nvcc true)
  endif()
  file(WRITE "${note}" "{\"built\": ${built}, \"reason\": \"${reason}\", \"needs_nvcc\": ${needs_nvcc}, "
                       "\"nvcc\": \"${CMAKE_CUDA_COMPILER_VERSION}\", "
                       "\"architectures\": \"${came8bit_cuda_names}\"}\n")
  if(SKBUILD_METADATA_DIR)
    install(FILES "${note}" DESTINATION "${SKBUILD_METADATA_DIR}")
  endif()
endfunction()

function(came8bit_without_cuda reason)
  if(NOT CAME8BIT_CUDA MATCHES "^(AUTO|OFF)$")
    message(FATAL_ERROR "CAME8BIT_CUDA=${CAME8BIT_CUDA}, and the CUDA kernels cannot be built: ${reason}")
  endif()
  message(STATUS "came8bit: NO CUDA KERNELS are built: ${reason}")
  came8bit_note_cuda(false "${reason}")
endfunction()

macro(came8bit_cuda_target)
  # PyPI's CUDA has its libraries in lib, where nvcc itself does not look for them.
  get_filename_component(cuda_lib "${came8bit_nvcc}/../../lib" ABSOLUTE)
  set(ENV{LIBRARY_PATH} "${cuda_lib}:$ENV{LIBRARY_PATH}")
  set(CMAKE_CUDA_COMPILER "${came8bit_nvcc}")
  if(NOT CMAKE_CUDA_HOST_COMPILER AND "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "${came8bit_cuda_architectures}")
  endif()
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  message(STATUS "came8bit: CUDA kernels by nvcc: ${came8bit_nvcc}")  # build_tools/build_backend.py looks for it
  enable_language(CUDA)

  # "75-real;90" as "sm_75 sm_90 compute_90": what cuobjdump calls them, and `came8bit info`.
  set(came8bit_cuda_names "")
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    string(REGEX MATCH "^[0-9]+[af]?|^[a-z-]+" number "${architecture}")
    if(NOT architecture MATCHES "-virtual$")
      string(APPEND came8bit_cuda_names " sm_${number}")
    endif()
    if(NOT architecture MATCHES "-real$")
      string(APPEND came8bit_cuda_names " compute_${number}")
    endif()
  endforeach()
  string(STRIP "${came8bit_cuda_names}" came8bit_cuda_names)

  add_library(came8bit_torch_cuda SHARED "${CMAKE_CURRENT_SOURCE_DIR}/cmake/torch_cuda_stub.cpp")
  set_target_properties(came8bit_torch_cuda PROPERTIES
    OUTPUT_NAME torch_cuda
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub"
    CXX_VISIBILITY_PRESET default)

  add_library(_C_cuda MODULE ${cuda_sources})
  set_target_properties(_C_cuda PROPERTIES PREFIX "")
  target_link_libraries(_C_cuda PRIVATE came8bit_flags came8bit_torch_cuda)
  target_link_directories(_C_cuda PRIVATE "${cuda_lib}")
  target_compile_definitions(_C_cuda PRIVATE USE_CUDA
    "CAME8BIT_NVCC_VERSION=\"${CMAKE_CUDA_COMPILER_VERSION}\""
    "CAME8BIT_CUDA_ARCHITECTURES=\"${came8bit_cuda_names}\"")
  # The defaults of nvcc but for fmad; written down because the results hang on them.
  target_compile_options(_C_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;-ftz=false;-prec-div=true;-prec-sqrt=true>"
    "$<$<COMPILE_LANGUAGE:CUDA>:--threads=2>")  # two architectures at a time: most of the work is in one file
  if(CAME8BIT_CUDA STREQUAL "compile-only")
    # build_tools/check_registers.py reads what ptxas says.
    target_compile_options(_C_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>")
    came8bit_note_cuda(false "CAME8BIT_CUDA=compile-only was set")
  else()
    install(TARGETS _C_cuda LIBRARY DESTINATION came8bit)
    came8bit_note_cuda(true "")
  endif()
  came8bit_limit_exports(_C_cuda)
  message(STATUS "came8bit: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, ${came8bit_cuda_names}")
endmacro()

file(GLOB cuda_sources CONFIGURE_DEPENDS
     "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu" "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cpp")
came8bit_choose_cuda()
if(came8bit_cuda_reason)
  came8bit_without_cuda("${came8bit_cuda_reason}")
else()
  came8bit_cuda_target()
endif()
