// For functions that constant arguments specialize: where they are not inlined, loops keep variable trip counts.

#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#    define TURBOKV_INLINE static __forceinline
#else
#    define TURBOKV_INLINE static inline __attribute__((always_inline))
#endif
