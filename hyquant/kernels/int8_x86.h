/* What the int8 code for x86-64 shares: vectors of either instruction set, codes of a row, tiles of exact sums.
 *
 *   AVX512-VNNI   vpdpbusd multiplies unsigned by signed bytes and adds four products to a 32-bit lane without
 *                 saturating. Codes are stored as q + 128, and 128 * sum_k W starts each sum, with a minus.
 *   AVX2          vpmaddubsw, the byte product there, saturates its 16-bit sums and is wrong for full-range operands.
 *                 Codes and weights are widened to 16 bits; vpmaddwd adds two products to a 32-bit lane, exactly.
 *
 * What multiplies codes is packed in panels of COLUMNS columns, [ceil(K/GROUP)][COLUMNS][GROUP], zero padded; GROUP is
 * what one lane sums.
 */
#ifndef HYQ_INT8_X86_H
#define HYQ_INT8_X86_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512VNNI__

typedef uint8_t code_t;
typedef int8_t packed_t;
typedef __m512 floats;
typedef __m512i integers;
enum { ROWS = 6, COLUMNS = 64, GROUP = 4, LANES = 16, CODE_OFFSET = 128 };

#define set_float _mm512_set1_ps
#define load_float _mm512_loadu_ps
#define store_float _mm512_storeu_ps
#define add_float _mm512_add_ps
#define sub_float _mm512_sub_ps
#define mul_float _mm512_mul_ps
#define div_float _mm512_div_ps
#define max_float _mm512_max_ps
#define min_float _mm512_min_ps
#define abs_float _mm512_abs_ps
#define round_float(v) _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define to_float _mm512_cvtepi32_ps
#define add_int _mm512_add_epi32
#define and_int _mm512_and_si512
#define max_int _mm512_max_epi32
#define load_bytes(p) to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define store_bytes(p, v) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)))
#define load_int(p) _mm512_loadu_si512((const void *)(p))
#define store_int(p, v) _mm512_storeu_si512((void *)(p), v)
#define set_int _mm512_set1_epi32
#define EVERY_VECTOR(DO, row) DO(row, 0) DO(row, 1) DO(row, 2) DO(row, 3)
/* Not the intrinsic: GCC 12 copies the sum before and after it. */
#define multiply_add(sum, codes, weights) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights))

static inline floats load_bfloat(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void store_bfloat(uint16_t *p, __m512i high_halves) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(high_halves));
}

static inline void store_codes(code_t *p, floats codes) {
    const __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(codes), _mm512_set1_epi32(CODE_OFFSET));
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(shifted));
}

static inline __m512i round_to_bfloat(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
}

#else

typedef int16_t code_t;
typedef int16_t packed_t;
typedef __m256 floats;
typedef __m256i integers;
enum { ROWS = 6, COLUMNS = 16, GROUP = 2, LANES = 8, CODE_OFFSET = 0 };

#define set_float _mm256_set1_ps
#define load_float _mm256_loadu_ps
#define store_float _mm256_storeu_ps
#define add_float _mm256_add_ps
#define sub_float _mm256_sub_ps
#define mul_float _mm256_mul_ps
#define div_float _mm256_div_ps
#define max_float _mm256_max_ps
#define min_float _mm256_min_ps
#define abs_float(v) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)
#define round_float(v) _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define to_float _mm256_cvtepi32_ps
#define add_int _mm256_add_epi32
#define and_int _mm256_and_si256
#define max_int _mm256_max_epi32
#define load_bytes(p) to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define load_int(p) _mm256_loadu_si256((const __m256i *)(p))
#define store_int(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define set_int _mm256_set1_epi32
#define EVERY_VECTOR(DO, row) DO(row, 0) DO(row, 1)
#define multiply_add(sum, codes, weights) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes, weights))

static inline floats load_bfloat(const uint16_t *p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline __m128i low_halves(__m256i v) {
    return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

static inline void store_bfloat(uint16_t *p, __m256i high_halves) { _mm_storeu_si128((__m128i *)p, low_halves(high_halves)); }

static inline __m128i codes_of(floats codes) {
    const __m256i wide = _mm256_cvtps_epi32(codes);
    return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

static inline void store_codes(code_t *p, floats codes) { _mm_storeu_si128((__m128i *)p, codes_of(codes)); }

static inline void store_bytes(int8_t *p, floats codes) {
    const __m128i halves = codes_of(codes);
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(halves, halves));
}

static inline __m256i round_to_bfloat(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
}

#endif

static inline int64_t groups_of(int64_t k) { return (k + GROUP - 1) / GROUP; }

static inline float bfloat_at(const uint16_t *p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline void quantize_row(const float *x, int64_t k, float scale, float offset, code_t *codes) {
    const floats scales = set_float(scale), offsets = set_float(offset), low = set_float(-128.0f), high = set_float(127.0f);
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        const floats value = round_float(add_float(div_float(load_float(x + i), scales), offsets));
        store_codes(codes + i, min_float(max_float(value, low), high));
    }
    for (; i < k; i++) {
        const float value = nearbyintf(x[i] / scale + offset);
        codes[i] = (code_t)((int32_t)(value > -128.0f ? (value < 127.0f ? value : 127.0f) : -128.0f) + CODE_OFFSET);
    }
    for (; i % GROUP; i++) codes[i] = 0;
}

/* Write to `sums`, [ROWS, COLUMNS], the sums at `from` (rows `from_stride` apart) plus the products of `groups` groups of K.
 * Every sum is a variable of its own: compilers leave arrays of vectors in memory. */
#define EVERY_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define LOAD_SUM(row, v) integers sum##row##v = load_int(from + row * from_stride + v * LANES);
#define STORE_SUM(row, v) store_int(sums + row * COLUMNS + v * LANES, sum##row##v);
#define LOAD_WEIGHTS(row, v) const integers weights##v = load_int(weights + v * LANES * GROUP);
#define ADD_PRODUCTS(row, v) multiply_add(sum##row##v, group##row, weights##v);
#define LOAD_SUMS(row) EVERY_VECTOR(LOAD_SUM, row)
#define STORE_SUMS(row) EVERY_VECTOR(STORE_SUM, row)
#define ADD_ROW(row)                                                \
    int32_t code##row;                                              \
    memcpy(&code##row, codes + row * stride, sizeof code##row);     \
    const integers group##row = set_int(code##row);                 \
    EVERY_VECTOR(ADD_PRODUCTS, row)

static inline void multiply_tile(const code_t *codes, int64_t stride, const packed_t *weights, int64_t groups,
                          const int32_t *from, int64_t from_stride, int32_t *sums) {
    EVERY_ROW(LOAD_SUMS)
    for (int64_t g = 0; g < groups; g++, codes += GROUP, weights += COLUMNS * GROUP) {
        EVERY_VECTOR(LOAD_WEIGHTS, 0)
        EVERY_ROW(ADD_ROW)
    }
    EVERY_ROW(STORE_SUMS)
}

#endif
