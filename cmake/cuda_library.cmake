# The CUDA library: csrc/*_cuda.cu for the GPUs of SDFAST_CUDA_ARCHS ("8.0;9.0a;12.0"; commas and spaces separate,
# too; 9.0+PTX as torch has it). Machine code for each, and PTX of the newest without an "a", for GPUs to come.
#
# It needs no torch that is built for CUDA, and no GPU. CUDA's run-time is linked in, and hidden, so that whatever
# CUDA torch came with is another one's; both use the driver's one context of a device.

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(CMAKE_CUDA_COMPILER nvcc HINTS "$ENV{CUDA_HOME}/bin" PATHS /usr/local/cuda/bin)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "SDFAST_CUDA_ARCHS=${SDFAST_CUDA_ARCHS}: nvcc was not found; set CUDACXX or CUDA_HOME")
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # -gencode below, the same for every CMake
enable_language(CUDA)
execute_process(
  COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9]+" known "${known}")

string(REGEX REPLACE "[, \t;]+" ";" asked "${SDFAST_CUDA_ARCHS}")
list(REMOVE_ITEM asked "")
set(codes "")  # 80 90a
set(plain "")  # those without an "a"
set(ptx "")
foreach(arch IN LISTS asked)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9])(a?)(\\+PTX)?$")
    message(FATAL_ERROR "SDFAST_CUDA_ARCHS: ${arch} is no architecture: expected such as 8.6, 9.0a or 9.0+PTX")
  endif()
  set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  if(number LESS 80)
    message(FATAL_ERROR "SDFAST_CUDA_ARCHS: ${arch} is too old: the kernels need 8.0 or later")
  elseif(NOT number IN_LIST known)
    message(FATAL_ERROR "SDFAST_CUDA_ARCHS: ${arch} is unknown to nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  list(APPEND codes ${number}${CMAKE_MATCH_3})
  if(NOT CMAKE_MATCH_3)
    list(APPEND plain ${number})
    if(CMAKE_MATCH_4)
      list(APPEND ptx ${number})
    endif()
  endif()
endforeach()
list(REMOVE_DUPLICATES codes)
list(SORT plain COMPARE NATURAL)

# Most of the time goes into PTX. Those of one major version share that of the first; ptxas tells them apart.
set(gencode "")
foreach(code IN LISTS codes)
  set(virtual ${code})
  string(REGEX REPLACE ".$" "" major "${code}")
  foreach(other IN LISTS plain)
    if(code IN_LIST plain AND other MATCHES "^${major}.$")
      set(virtual ${other})
      break()
    endif()
  endforeach()
  list(APPEND gencode -gencode=arch=compute_${virtual},code=sm_${code})
  if(plain MATCHES "(^|;)${code}$")  # the newest
    list(PREPEND ptx ${virtual})
  endif()
endforeach()
list(REMOVE_DUPLICATES ptx)
foreach(code IN LISTS ptx)
  list(APPEND gencode -gencode=arch=compute_${code},code=compute_${code})
endforeach()
if(ptx)
  message(STATUS "CUDA: machine code for ${codes}, PTX of ${ptx}")
else()
  message(STATUS "CUDA: machine code for ${codes}, no PTX: only an architecture without an \"a\" gives it")
endif()

set(threads "$ENV{NVCC_THREADS}")  # architectures compiled at once, within one of the build's jobs
if(NOT threads)
  set(threads 2)
endif()

# The stream of a call is asked of libtorch_cuda, which a torch for CUDA has loaded by then, and only those who name it
# see it. Its name is all that the linker needs.
file(WRITE "${CMAKE_BINARY_DIR}/torch_cuda_name.cpp" "")
add_library(torch_cuda_name SHARED "${CMAKE_BINARY_DIR}/torch_cuda_name.cpp")
set_target_properties(torch_cuda_name PROPERTIES OUTPUT_NAME torch_cuda)

file(GLOB kernels CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/*_cuda.cu")
add_library(_C_cuda MODULE ${kernels})
target_include_directories(_C_cuda SYSTEM PRIVATE "${SDFAST_TORCH_DIR}/include")
target_compile_definitions(_C_cuda PRIVATE TORCH_TARGET_VERSION=0x020a000000000000 TORCH_STABLE_ONLY USE_CUDA)
target_compile_options(_C_cuda PRIVATE ${gencode} --threads ${threads} -Xcompiler=-fvisibility=hidden,-Wall)
target_link_libraries(_C_cuda PRIVATE "${SDFAST_LIBTORCH_CPU}")
target_link_options(_C_cuda PRIVATE -Wl,--exclude-libs,ALL -Wl,--no-as-needed "$<TARGET_FILE:torch_cuda_name>"
                                    -Wl,--as-needed)
add_dependencies(_C_cuda torch_cuda_name)
set_target_properties(
  _C_cuda PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                     CUDA_RUNTIME_LIBRARY Static LIBRARY_OUTPUT_DIRECTORY "${SDFAST_OUTPUT_DIR}")

# Beside it, what it holds (sdfast/_cuda_archs.py reads it).
list(JOIN codes "\", \"" codes)
list(JOIN ptx "\", \"" ptx)
if(ptx)
  set(ptx "\"${ptx}\"")
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" toolkit "${CMAKE_CUDA_COMPILER_VERSION}")
file(WRITE "${CMAKE_BINARY_DIR}/_C_cuda.json"
     "{\"code\": [\"${codes}\"], \"ptx\": [${ptx}], \"cuda\": \"${toolkit}\"}\n")
add_custom_command(
  TARGET _C_cuda POST_BUILD
  COMMAND "${CMAKE_COMMAND}" -E copy "${CMAKE_BINARY_DIR}/_C_cuda.json" "${SDFAST_OUTPUT_DIR}/_C_cuda.json")
install(TARGETS _C_cuda LIBRARY DESTINATION .)
install(FILES "${CMAKE_BINARY_DIR}/_C_cuda.json" DESTINATION .)
