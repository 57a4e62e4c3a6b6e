# Obtains llama.cpp, makes a hooked copy in the build folder, adds it to this build with our sources in it.

# The pin. The Python bindings of this release were written for exactly this commit.
set(TURBOKV_PIN_VERSION      "0.3.36")   # of llama-cpp-python, whose sdist carries llama.cpp
set(TURBOKV_PIN_COMMIT       "0c1e57098bba43ac29e6e3b677cdceebdd22334f")
set(TURBOKV_PIN_SHA256       "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
set(TURBOKV_PIN_LLAMA_H      "d5cf9203bea63b575e76cba4881f29cfd1b611451578b01582b75b72ecbb04bc")

set(TURBOKV_PIN_ARCHIVE "llama_cpp_python-${TURBOKV_PIN_VERSION}.tar.gz")

# Sets `result` to the folder of the unpacked pinned sdist; fetches it at most once per machine.
function(turbokv_fetch_pin result)
    set(cache "${TURBOKV_CACHE_DIR}")
    if (NOT cache)
        set(cache "$ENV{XDG_CACHE_HOME}")
        if (NOT cache)
            set(cache "$ENV{HOME}/.cache")
        endif()
        string(APPEND cache "/turbokv")
    endif()
    set(archive "${cache}/${TURBOKV_PIN_ARCHIVE}")
    set(unpacked "${CMAKE_BINARY_DIR}/upstream/llama_cpp_python-${TURBOKV_PIN_VERSION}")

    file(MAKE_DIRECTORY "${cache}")
    file(LOCK "${cache}/lock" GUARD FUNCTION TIMEOUT 600)
    if (EXISTS "${archive}")
        file(SHA256 "${archive}" found)
        if (NOT found STREQUAL TURBOKV_PIN_SHA256)
            message(STATUS "turbokv: ${archive} is damaged or not the pinned release; fetching it again")
            file(REMOVE "${archive}")
        endif()
    endif()
    if (NOT EXISTS "${archive}")
        message(STATUS "turbokv: fetching llama-cpp-python ${TURBOKV_PIN_VERSION} (llama.cpp ${TURBOKV_PIN_COMMIT}, 77 MB) with pip")
        file(REMOVE_RECURSE "${cache}/download")
        execute_process(
            COMMAND "${Python3_EXECUTABLE}" -m pip download --no-deps --no-binary llama-cpp-python
                    --dest "${cache}/download" "llama-cpp-python==${TURBOKV_PIN_VERSION}"
            RESULT_VARIABLE failed)
        set(fetched "${cache}/download/${TURBOKV_PIN_ARCHIVE}")
        if (failed OR NOT EXISTS "${fetched}")
            file(REMOVE_RECURSE "${cache}/download")
            message(FATAL_ERROR
                "turbokv: pip could not fetch llama-cpp-python ${TURBOKV_PIN_VERSION} (its message is above).\n"
                "Without a network: put ${TURBOKV_PIN_ARCHIVE} from PyPI into ${cache}, or build on a tree of your own "
                "with -DTURBOKV_LLAMA_SOURCE=/path/to/llama.cpp")
        endif()
        file(SHA256 "${fetched}" found)
        if (NOT found STREQUAL TURBOKV_PIN_SHA256)
            file(REMOVE_RECURSE "${cache}/download")
            message(FATAL_ERROR
                "turbokv: the fetched ${TURBOKV_PIN_ARCHIVE} has SHA-256 ${found}, expected ${TURBOKV_PIN_SHA256}.\n"
                "Your package index serves another file. Nothing of it was used or kept.")
        endif()
        file(RENAME "${fetched}" "${archive}")
        file(REMOVE_RECURSE "${cache}/download")
    endif()

    if (NOT EXISTS "${unpacked}.ok")   # written last: an interrupted extraction is done again
        file(REMOVE_RECURSE "${unpacked}")
        file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${CMAKE_BINARY_DIR}/upstream"
             PATTERNS "*/vendor/llama.cpp/*" "*/llama_cpp/*" "*/LICENSE.md")
        if (NOT EXISTS "${unpacked}/vendor/llama.cpp/include/llama.h")
            message(FATAL_ERROR "turbokv: could not unpack ${archive} into ${CMAKE_BINARY_DIR}/upstream; is the disk full?")
        endif()
        file(TOUCH "${unpacked}.ok")
    endif()
    set(${result} "${unpacked}" PARENT_SCOPE)
endfunction()

# 1. The source. The bindings only fit a tree with the pin's llama.h.
if (TURBOKV_LLAMA_SOURCE)
    get_filename_component(TURBOKV_SOURCE "${TURBOKV_LLAMA_SOURCE}" ABSOLUTE)
    set(TURBOKV_COMMIT "unknown")
    if (EXISTS "${TURBOKV_SOURCE}/.git")
        execute_process(COMMAND git -C "${TURBOKV_SOURCE}" describe --always --abbrev=40 --exclude=* --dirty
                        OUTPUT_VARIABLE described OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
        if (NOT failed)
            set(TURBOKV_COMMIT "${described}")
        endif()
    endif()
    set(TURBOKV_BINDINGS "")
    if (EXISTS "${TURBOKV_SOURCE}/include/llama.h")
        file(SHA256 "${TURBOKV_SOURCE}/include/llama.h" llama_h)
        if (llama_h STREQUAL TURBOKV_PIN_LLAMA_H)
            turbokv_fetch_pin(sdist)
            set(TURBOKV_BINDINGS "${sdist}/llama_cpp")
        endif()
    endif()
else()
    turbokv_fetch_pin(sdist)
    set(TURBOKV_SOURCE   "${sdist}/vendor/llama.cpp")
    set(TURBOKV_COMMIT   "${TURBOKV_PIN_COMMIT}")
    set(TURBOKV_BINDINGS "${sdist}/llama_cpp")
endif()

# 2. The hooked copy: written only where it differs.
set(TURBOKV_LLAMA_DIR "${CMAKE_BINARY_DIR}/llama.cpp")
execute_process(
    COMMAND "${Python3_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/ggml-ext/apply_hooks.py"
            "${TURBOKV_SOURCE}" "${TURBOKV_LLAMA_DIR}" --report "${CMAKE_BINARY_DIR}/hooks.json"
    OUTPUT_VARIABLE summary OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE failed)
if (failed)
    message(FATAL_ERROR "turbokv: the hooks could not be applied to ${TURBOKV_SOURCE} (the reason is above)")
endif()
message(STATUS "turbokv: ${summary}")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    "${PROJECT_SOURCE_DIR}/ggml-ext/hooks.toml" "${PROJECT_SOURCE_DIR}/ggml-ext/apply_hooks.py")

# 3. The build of llama.cpp. Its own defaults stand unless our users or our layout need something else.
string(SUBSTRING "${TURBOKV_COMMIT}" 0 9 LLAMA_BUILD_COMMIT)
set(LLAMA_BUILD_NUMBER    0)
set(GGML_BUILD_NUMBER     1)
set(LLAMA_BUILD_COMMON    ON)
set(LLAMA_BUILD_TOOLS     ON)
set(LLAMA_BUILD_SERVER    ON)
set(LLAMA_BUILD_TESTS     OFF)
set(LLAMA_BUILD_EXAMPLES  OFF)
set(LLAMA_BUILD_APP       OFF)
set(LLAMA_TOOLS_INSTALL   OFF)
set(LLAMA_USE_PREBUILT_UI OFF CACHE BOOL "Download the web UI while building")
set(GGML_RPC              ON  CACHE BOOL "Build rpc-server")
set(BUILD_SHARED_LIBS     ON)

if (TURBOKV_CUDA)
    find_package(CUDAToolkit)
    if (NOT CUDAToolkit_FOUND OR CUDAToolkit_VERSION VERSION_LESS 12.4)
        message(FATAL_ERROR "turbokv: -DTURBOKV_CUDA=ON needs the CUDA toolkit 12.4 or newer, found: "
                            "${CUDAToolkit_VERSION} ${CUDAToolkit_NVCC_EXECUTABLE} (-DCUDAToolkit_ROOT=DIR names another)")
    endif()
    set(GGML_CUDA ON)
elseif (GGML_CUDA)
    message(FATAL_ERROR "turbokv: -DGGML_CUDA=ON alone would build the CUDA backend without our kernels; "
                        "configure with -DTURBOKV_CUDA=ON instead")
endif()
foreach (backend BLAS CANN HEXAGON HIP METAL MUSA OPENCL OPENVINO SYCL VIRTGPU VULKAN WEBGPU ZDNN)
    if (GGML_${backend})
        message(FATAL_ERROR "turbokv: the types have CPU and CUDA kernels only, and llama.cpp would abort on another "
                            "backend; configure with -DGGML_${backend}=OFF")
    endif()
endforeach()
set(GGML_METAL OFF CACHE BOOL "No Metal kernels yet")
if (UNIX AND NOT APPLE)
    # DT_RPATH: a llama.cpp in the user's LD_LIBRARY_PATH must not be loaded instead of ours
    add_link_options(-Wl,--disable-new-dtags)
endif()

include_directories(${PROJECT_SOURCE_DIR}/ggml-ext ${PROJECT_SOURCE_DIR}/ggml-ext/generated)
add_subdirectory(${TURBOKV_LLAMA_DIR} ${CMAKE_BINARY_DIR}/llama.cpp-build EXCLUDE_FROM_ALL)

target_sources(ggml-base PRIVATE ${PROJECT_SOURCE_DIR}/ggml-ext/turbokv-quants.c)
# One CPU library, or with GGML_CPU_ALL_VARIANTS one per instruction set, from the same sources.
get_property(targets DIRECTORY ${TURBOKV_LLAMA_DIR}/ggml/src PROPERTY BUILDSYSTEM_TARGETS)
list(FILTER targets INCLUDE REGEX "^ggml-cpu(-[a-z0-9_.]+)?$")
list(FILTER targets EXCLUDE REGEX "-feats$")
set(TURBOKV_CPU_LIBRARIES ${targets})
set(cpu_sources turbokv-cpu.c turbokv-tile.c turbokv-attention.c)
list(TRANSFORM cpu_sources PREPEND ${PROJECT_SOURCE_DIR}/ggml-ext/)
foreach (target ${TURBOKV_CPU_LIBRARIES})
    target_sources(${target} PRIVATE ${cpu_sources})
endforeach()
foreach (option TURBOKV_ATTENTION_UPSTREAM_TYPES TURBOKV_ATTENTION_FLOAT)
    if (${option})
        message(STATUS "turbokv: ${option} is on: not the build that users get")
        set_property(SOURCE ${PROJECT_SOURCE_DIR}/ggml-ext/turbokv-attention.c
            TARGET_DIRECTORY ${TURBOKV_CPU_LIBRARIES} APPEND PROPERTY COMPILE_DEFINITIONS ${option})
    endif()
endforeach()
if (NOT MSVC)   # the same bits on every instruction set: no multiply-add where the source has none
    set_source_files_properties(${PROJECT_SOURCE_DIR}/ggml-ext/turbokv-quants.c ${cpu_sources}
        TARGET_DIRECTORY ggml-base ${TURBOKV_CPU_LIBRARIES} PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
endif()
if (TURBOKV_CUDA)
    add_subdirectory(${PROJECT_SOURCE_DIR}/cuda ${CMAKE_BINARY_DIR}/cuda)
endif()
target_sources(llama     PRIVATE ${PROJECT_SOURCE_DIR}/ggml-ext/turbokv-llama.cpp)
set_source_files_properties(${PROJECT_SOURCE_DIR}/ggml-ext/turbokv-llama.cpp
    TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

# 4. What we build of it and what the wheel carries: tools, their libraries, the facts of the build, the bindings.
set(TURBOKV_TOOLS llama-server llama-cli llama-bench llama-perplexity llama-quantize llama-gguf-split ggml-rpc-server)
set(TURBOKV_LIBRARIES
    ggml-base ${TURBOKV_CPU_LIBRARIES} ggml-rpc ggml llama llama-common mtmd
    llama-server-impl llama-cli-impl llama-bench-impl llama-perplexity-impl llama-quantize-impl)
if (TURBOKV_CUDA)
    list(APPEND TURBOKV_LIBRARIES ggml-cuda)
endif()
foreach (target ${TURBOKV_TOOLS} ${TURBOKV_LIBRARIES})
    if (NOT TARGET ${target})
        message(FATAL_ERROR "turbokv: ${TURBOKV_SOURCE} does not build ${target}: it is older or newer than the overlay "
                            "knows. Use a tree nearer to ${TURBOKV_PIN_COMMIT}, or correct ggml-ext/upstream.cmake")
    endif()
endforeach()
# No versioned names: a wheel would carry each library three times.
set_property(TARGET ${TURBOKV_LIBRARIES} PROPERTY VERSION)
set_property(TARGET ${TURBOKV_LIBRARIES} PROPERTY SOVERSION)
# Nor headers: the wheel is no development package.
set_property(TARGET ${TURBOKV_LIBRARIES} PROPERTY PUBLIC_HEADER)
set_property(TARGET ${TURBOKV_LIBRARIES} PROPERTY PRIVATE_HEADER)

add_custom_target(turbokv-tools ALL DEPENDS ${TURBOKV_TOOLS})
if (UNIX)
    add_custom_command(TARGET turbokv-tools POST_BUILD   # upstream's older name, which scripts still use
        COMMAND ${CMAKE_COMMAND} -E create_symlink ggml-rpc-server ${CMAKE_BINARY_DIR}/bin/rpc-server)
endif()

file(READ "${CMAKE_BINARY_DIR}/hooks.json" TURBOKV_HOOKS_JSON)
if (TURBOKV_LLAMA_SOURCE)
    set(TURBOKV_SOURCE_NAME "TURBOKV_LLAMA_SOURCE")
else()
    set(TURBOKV_SOURCE_NAME "llama-cpp-python ${TURBOKV_PIN_VERSION}")
endif()
set(TURBOKV_HAS_BINDINGS false)
if (TURBOKV_BINDINGS)
    set(TURBOKV_HAS_BINDINGS true)
    file(GLOB bindings "${TURBOKV_BINDINGS}/*.py")
    file(COPY ${bindings} DESTINATION "${CMAKE_BINARY_DIR}/bin/bindings/llama_cpp")
endif()
list(JOIN TURBOKV_TOOLS "\", \"" TURBOKV_TOOLS_JSON)
configure_file(${PROJECT_SOURCE_DIR}/ggml-ext/turbokv-build.json.in ${CMAKE_BINARY_DIR}/bin/turbokv-build.json @ONLY)

install(TARGETS ${TURBOKV_TOOLS} ${TURBOKV_LIBRARIES}
        RUNTIME DESTINATION . COMPONENT turbokv
        LIBRARY DESTINATION . COMPONENT turbokv)
install(FILES ${CMAKE_BINARY_DIR}/bin/turbokv-build.json DESTINATION . COMPONENT turbokv)
# `turbokv doctor --llama-source` applies the hooks to other trees.
install(FILES ${PROJECT_SOURCE_DIR}/ggml-ext/apply_hooks.py ${PROJECT_SOURCE_DIR}/ggml-ext/hooks.toml
        DESTINATION overlay COMPONENT turbokv)
install(FILES ${TURBOKV_LLAMA_DIR}/LICENSE DESTINATION licenses RENAME llama.cpp COMPONENT turbokv)
# Licences of the libraries inside llama.cpp that have a file of their own; NOTICE names the others.
file(GLOB vendored ${TURBOKV_LLAMA_DIR}/licenses/LICENSE-*)
install(FILES ${vendored} DESTINATION licenses COMPONENT turbokv)
if (TURBOKV_BINDINGS)
    install(DIRECTORY ${CMAKE_BINARY_DIR}/bin/bindings DESTINATION . COMPONENT turbokv FILES_MATCHING PATTERN "*.py")
    install(FILES ${sdist}/LICENSE.md DESTINATION licenses RENAME llama-cpp-python COMPONENT turbokv)
endif()
