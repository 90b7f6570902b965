/* Attention on int8 q, k and v for x86-64 processors with AVX512-VNNI.
 *
 *   q, k, v codes = clamp(round(x / s), -128, 127), one scale per head
 *   t = (q k^T) s_q s_k log2(e) / sqrt(D)                     exact sums, from the largest one of KEYS keys downwards
 *   w = round(255 * 2^(t - max t))                            the softmax's numerators, 8 bits for each KEYS keys
 *   out = sum of blocks of keys of (w v) / (sum of w) * s_v   exact sums, blocks weighed in float32
 *
 * q, k, v and out are [S, A, D] float32 or bfloat16, row-major. Each block of keys has a largest numerator of its own, so
 * that many small ones are not rounded away beside a large one far off; a row's numerators are summed after rounding, so
 * that its weights add up to one. The loop over blocks is the online softmax of Milakov and Gimelshein (arXiv 1805.02867),
 * as FlashAttention orders it (arXiv 2205.14135).
 *
 * k is packed in panels of COLUMNS keys, v in panels of COLUMNS channels over all keys; keys that must not be seen are left
 * out of both.
 */
#include "int8_x86.h"

#ifdef __AVX512VNNI__

enum { KEYS = 256, PANELS = KEYS / COLUMNS, QUERIES = 8 * ROWS, LARGEST_DIM = 256 };

typedef struct {
    const void *q, *k, *v;                       /* [S, A, D] */
    void *out;                                   /* [S, A, D] */
    const int64_t *seen;                         /* [keys], positions of the keys that may be seen; NULL for all */
    const float *q_scales, *k_scales, *v_scales; /* [A] */
    int8_t *keys_packed, *values_packed;         /* [A][padded keys][padded D] */
    int32_t *starts;                             /* [A][padded keys], what each sum of q k^T starts from */
    int64_t queries, keys, heads, dim;
    int32_t is_bfloat;
} Job;

static inline int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

static const float *token(const Job *job, const void *x, int64_t token, int64_t head, float *buffer) {
    const int64_t at = (token * job->heads + head) * job->dim;
    if (!job->is_bfloat) return (const float *)x + at;
    const uint16_t *half = (const uint16_t *)x + at;
    int64_t i = 0;
    for (; i + LANES <= job->dim; i += LANES) store_float(buffer + i, load_bfloat(half + i));
    for (; i < job->dim; i++) buffer[i] = bfloat_at(half + i);
    return buffer;
}

/* Quantize COLUMNS keys of k or v, [COLUMNS, width] codes with nothing added; absent keys and channels are zero. */
static void key_codes(const Job *job, const void *x, float scale, int64_t head, int64_t panel, int64_t width, uint8_t *codes) {
    float buffer[LARGEST_DIM];
    memset(codes, 0, COLUMNS * width);
    for (int64_t lane = 0; lane < COLUMNS && panel * COLUMNS + lane < job->keys; lane++) {
        const int64_t key = panel * COLUMNS + lane;
        const float *values = token(job, x, job->seen ? job->seen[key] : key, head, buffer);
        quantize_row(values, job->dim, scale, 0.0f, codes + lane * width);
        for (int64_t i = 0; i < job->dim; i++) codes[lane * width + i] ^= CODE_OFFSET;
    }
}

static void pack_keys(const Job *job, int64_t head, int64_t panel) {
    const int64_t width = padded(job->dim, GROUP), keys = padded(job->keys, COLUMNS);
    uint8_t codes[COLUMNS * LARGEST_DIM];
    int8_t *out = job->keys_packed + (head * keys + panel * COLUMNS) * width;
    key_codes(job, job->k, job->k_scales[head], head, panel, width, codes);
    for (int64_t lane = 0; lane < COLUMNS; lane++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < width; i++) sum += (int8_t)codes[lane * width + i];
        job->starts[head * keys + panel * COLUMNS + lane] = -CODE_OFFSET * sum;
        for (int64_t g = 0; g < width / GROUP; g++)
            memcpy(out + (g * COLUMNS + lane) * GROUP, codes + lane * width + g * GROUP, GROUP);
    }
}

static void pack_values(const Job *job, int64_t head, int64_t panel) {
    const int64_t width = padded(job->dim, COLUMNS), keys = padded(job->keys, COLUMNS);
    uint8_t codes[COLUMNS * LARGEST_DIM];
    key_codes(job, job->v, job->v_scales[head], head, panel, width, codes);
    for (int64_t column = 0; column < width; column += COLUMNS) {
        int8_t *out = job->values_packed + head * keys * width + column * keys + panel * COLUMNS * COLUMNS;
        for (int64_t lane = 0; lane < COLUMNS; lane += GROUP)
            for (int64_t i = 0; i < COLUMNS; i += 16, out += 16 * GROUP) {
                __m128i rows[GROUP];
                for (int row = 0; row < GROUP; row++)
                    rows[row] = _mm_loadu_si128((const __m128i *)(codes + (lane + row) * width + column + i));
                const __m128i low = _mm_unpacklo_epi8(rows[0], rows[1]), high = _mm_unpackhi_epi8(rows[0], rows[1]);
                const __m128i low2 = _mm_unpacklo_epi8(rows[2], rows[3]), high2 = _mm_unpackhi_epi8(rows[2], rows[3]);
                _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi16(low, low2));
                _mm_storeu_si128((__m128i *)out + 1, _mm_unpackhi_epi16(low, low2));
                _mm_storeu_si128((__m128i *)out + 2, _mm_unpacklo_epi16(high, high2));
                _mm_storeu_si128((__m128i *)out + 3, _mm_unpackhi_epi16(high, high2));
            }
    }
}

/* 2^x for x of any size below 8, to 4e-6: the exponent by scalef, the rest by interpolation at Chebyshev points. */
static inline floats power_of_two(floats x) {
    const floats whole = round_float(x), rest = _mm512_sub_ps(x, whole);
    floats value = _mm512_fmadd_ps(set_float(0.00966637f), rest, set_float(0.05592198f));
    value = _mm512_fmadd_ps(value, rest, set_float(0.24022349f));
    value = _mm512_fmadd_ps(value, rest, set_float(0.69312105f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(value, rest, set_float(1.0f)), whole);
}

static inline __mmask16 lanes_below(int64_t count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1 << count) - 1);
}

/* Turn one row of `count` sums, COLUMNS of each panel, into numerators; write their sum and return the largest sum. */
static inline int32_t numerators(const int32_t *sums, int64_t count, float scale, uint8_t *codes, int32_t *total) {
    integers largest = set_int(INT32_MIN), added = set_int(0);
    for (int64_t i = 0; i < count; i += LANES) {
        const int32_t *at = sums + i / COLUMNS * ROWS * COLUMNS + i % COLUMNS;
        largest = _mm512_mask_max_epi32(largest, lanes_below(count - i), largest, load_int(at));
    }
    const int32_t top = _mm512_reduce_max_epi32(largest);
    for (int64_t i = 0; i < padded(count, COLUMNS); i += LANES) {
        const int32_t *at = sums + i / COLUMNS * ROWS * COLUMNS + i % COLUMNS;
        const floats below = to_float(_mm512_sub_epi32(load_int(at), set_int(top)));
        const floats numerator = power_of_two(_mm512_fmadd_ps(below, set_float(scale), set_float(7.99435344f) /* log2 255 */));
        const integers code = _mm512_maskz_cvtps_epi32(lanes_below(count - i), numerator);
        added = add_int(added, code);
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(code));
    }
    *total = _mm512_reduce_add_epi32(added);
    return top;
}

static void attend(const Job *job, int64_t head, int64_t first) {
    const int64_t dim = job->dim, stride = padded(dim, GROUP), width = padded(dim, COLUMNS), keys = padded(job->keys, COLUMNS);
    const int64_t rows = job->queries - first < QUERIES ? job->queries - first : QUERIES;
    const int8_t *keys_packed = job->keys_packed + head * keys * stride, *values = job->values_packed + head * keys * width;
    const int32_t *starts = job->starts + head * keys, zeros[COLUMNS] = {0};
    const float scale = job->q_scales[head] * job->k_scales[head] * 1.44269504f / sqrtf((float)dim);
    float out[QUERIES * LARGEST_DIM], tops[QUERIES], totals[QUERIES], buffer[LARGEST_DIM];
    int32_t sums[PANELS * ROWS * COLUMNS] __attribute__((aligned(64)));
    uint8_t codes[QUERIES * LARGEST_DIM], weights[ROWS * KEYS] __attribute__((aligned(64)));
    memset(codes, 0, sizeof codes);
    for (int64_t row = 0; row < rows; row++) {
        quantize_row(token(job, job->q, first + row, head, buffer), dim, job->q_scales[head], 0.0f, codes + row * stride);
        tops[row] = -INFINITY;
        totals[row] = 0.0f;
    }
    memset(out, 0, sizeof(float) * rows * width);
    for (int64_t key = 0; key < job->keys; key += KEYS) {
        const int64_t count = job->keys - key < KEYS ? job->keys - key : KEYS;
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t live = rows - row < ROWS ? rows - row : ROWS;
            float kept[ROWS], gained[ROWS];
            for (int64_t i = 0; i < count; i += COLUMNS)
                multiply_tile(codes + row * stride, stride, keys_packed + (key + i) * stride, stride / GROUP,
                              starts + key + i, 0, sums + i * ROWS);
            for (int64_t i = 0; i < live; i++) {
                int32_t total;
                const float top = scale * (float)numerators(sums + i * COLUMNS, count, scale, weights + i * KEYS, &total);
                const float largest = top > tops[row + i] ? top : tops[row + i];
                kept[i] = exp2f(tops[row + i] - largest);
                gained[i] = exp2f(top - largest);
                totals[row + i] = totals[row + i] * kept[i] + gained[i] * (float)total;
                tops[row + i] = largest;
            }
            for (int64_t column = 0; column < width; column += COLUMNS) {
                multiply_tile(weights, KEYS, values + column * keys + key * COLUMNS, padded(count, COLUMNS) / GROUP, zeros, 0, sums);
                for (int64_t i = 0; i < live; i++)
                    for (int64_t lane = 0; lane < COLUMNS; lane += LANES) {
                        float *at = out + (row + i) * width + column + lane;
                        const floats gain = mul_float(to_float(load_int(sums + i * COLUMNS + lane)), set_float(gained[i]));
                        store_float(at, _mm512_fmadd_ps(load_float(at), set_float(kept[i]), gain));
                    }
            }
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = ((first + row) * job->heads + head) * dim;
        const floats factor = set_float(job->keys ? job->v_scales[head] / totals[row] : 0.0f);
        for (int64_t i = 0; i < dim; i += LANES) {
            const __mmask16 lanes = lanes_below(dim - i);
            const floats value = mul_float(load_float(out + row * width + i), factor);
            if (job->is_bfloat)
                _mm256_mask_storeu_epi16((uint16_t *)job->out + at + i, lanes, _mm512_cvtepi32_epi16(round_to_bfloat(value)));
            else _mm512_mask_storeu_ps((float *)job->out + at + i, lanes, value);
        }
    }
}

/* Return 0, or 1 when memory for the codes was refused or a head is wider than LARGEST_DIM (out is then untouched). */
int hyq_int8_attention(const void *q, const void *k, const void *v, void *out, const int64_t *seen, const float *q_scales,
                       const float *k_scales, const float *v_scales, int64_t queries, int64_t keys, int64_t heads,
                       int64_t dim, int is_bfloat, int threads) {
    const int64_t rows = padded(keys, COLUMNS), panels = rows / COLUMNS, blocks = (queries + QUERIES - 1) / QUERIES;
    int8_t *keys_packed = malloc(heads * rows * padded(dim, GROUP) + 64);
    int8_t *values_packed = malloc(heads * rows * padded(dim, COLUMNS) + 64);
    int32_t *starts = malloc(sizeof(int32_t) * heads * rows + 64);
    const int failed = !keys_packed || !values_packed || !starts || dim > LARGEST_DIM;
    const Job job = {q, k, v, out, seen, q_scales, k_scales, v_scales, keys_packed, values_packed,
                     starts, queries, keys, heads, dim, is_bfloat};
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static) collapse(2)
            for (int64_t head = 0; head < heads; head++)
                for (int64_t panel = 0; panel < panels; panel++) {
                    pack_keys(&job, head, panel);
                    pack_values(&job, head, panel);
                }
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t head = 0; head < heads; head++)
                for (int64_t block = 0; block < blocks; block++) attend(&job, head, block * QUERIES);
        }
    }
    free(keys_packed);
    free(values_packed);
    free(starts);
    return failed;
}

#endif
