// The sweep of tiled.py in cache blocks: the sums of a softmax over the whole vocabulary and their
// products with the head.
//
//     e = exp(z / tau - shift)   total = sum e   entropy = -sum e log e   product = sum e dz/dx W
//
// For each tile of columns (rows of W) and each block of rows (tokens):
//
//     multiply_in   z^T [columns, rows] = W h^T, fp32
//     transform     bias, scale, softcap; -inf at held-out columns
//     softmax       e of one channel, its sums, in fp32 over 32 columns and in fp64 beyond
//     multiply_out  product [rows, D] += e W
//
// z is transposed so that the lanes of a vector are tokens: no sum crosses lanes. A tile of W is
// read from memory once and packed once for all rows.
//
// The file is compiled once for each level of the processor, into a library of its own; the flags
// decide what is below:
//
//     portable      vectors of 4 numbers (SSE2, NEON)
//     AVX2          of 8, with FMA
//     AVX-512       of 16
//     AVX-512-BF16  bf16 only: z by dot products of bf16 pairs, which deliver fp32
//     AMX           bf16 only: both products by tiles. e goes in two bf16 parts: one part would
//                   leave 8 bits of it, and a product that is a small difference from the
//                   teacher's needs more (notes/held-out-columns.md)
//
// Elsewhere a bf16 head is widened to fp32 as it is packed. Products of bf16 are exact in fp32, so
// every level sums the same terms, in another order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4  // vectors side by side in a block of a product: 6 x 4 sums of 32 registers
#elif defined(__AVX2__)
#define LANES 8
#define WIDE 2  // 6 x 2 of 16
#else
#define LANES 4
#define WIDE 2
#endif
#define INLINE inline __attribute__((always_inline))
#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// One online softmax of tiled.Sums. Arrays are [splits, padded rows]: each thread has its own.
struct Channel {
    float* shift;    // in: where to start; out: what the sums refer to
    double* total;   // out
    double* entropy;  // out, or null
    float* product;  // out [splits, padded rows, padded D + 16], or null
    float inverse_tau;
    int32_t columns;  // 0: all; 1: those that keep keeps; 2: the others
};

struct Problem {
    const void* h;            // [N, D], contiguous
    const void* W;            // [V, D]
    const float* bias;        // [V] or null
    const uint8_t* keep;      // [V] or null
    const int64_t* held_column;  // [held] ascending: columns that one row leaves out
    const int64_t* held_row;     // [held]
    void* workspace;          // fastsiu_workspace() bytes, aligned to 64
    int64_t N, V, D, held;
    int64_t W_row, W_column;  // strides of W, in numbers
    int64_t tile;             // columns at a time, a multiple of 32
    int32_t bf16;             // dtype of h and W: 0 fp32, 1 bf16
    int32_t row_groups, splits;  // threads: row groups times splits of the vocabulary
    int32_t channels;         // 1 or 2
    float scale, softcap;     // softcap 0: none
    Channel channel[2];
};

}  // extern "C"

namespace {

// ------------------------------------------------------------------------------------------------
// vectors: the extension of GCC and clang, whose operators act on each lane

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef float LooseV __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t LooseI __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE V load(const float* p) { return *reinterpret_cast<const LooseV*>(p); }
INLINE void store(float* p, V x) { *reinterpret_cast<LooseV*>(p) = x; }
INLINE V all(float x) { return x - V{}; }
INLINE V greater(V a, V b) { return a > b ? a : b; }

const float JUMP = 30.0f;    // as in tiled.py
const float LOWEST = -87.0f;  // exp below this is 0
const int64_t CHUNK = 32;    // columns whose e are summed in fp32, and the depth of an AMX tile
const int64_t ROWS = 256;    // tokens in a block
// Rows that are a power of two apart would share a few sets of the caches.
const int64_t APART = 16, STRIDE = ROWS + APART;  // of z^T

// e^x, relative error 2e-7; 0 below LOWEST; NaN stays NaN. x is at most a little above JUMP.
INLINE V exponential(V x) {
    const V lowest = all(LOWEST), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds
    V inside = x < lowest ? lowest : x;
    V shifted = inside * 1.44269504088896341f + magic, n = shifted - magic;
    V r = inside - n * 0.693359375f;  // log 2 in two parts
    r = r + n * 2.12194440e-4f;
    V p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    I bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;  // 2^n
    V power;
    memcpy(&power, &bits, sizeof power);
    return x < lowest ? V{} : p * power;
}

// tanh with a relative error of a few eps. Near 0 a series, because 1 - exp(-2 x) cancels.
INLINE V hyperbolic_tangent(V x) {
    V size = x < 0.0f ? -x : x, t = exponential(-2.0f * size), far = (1.0f - t) / (1.0f + t);
    V s = x * x;
    V series = s * (62.0f / 2835.0f) + (-17.0f / 315.0f);
    series = series * s + 2.0f / 15.0f;
    series = series * s + -1.0f / 3.0f;
    V near = x * (series * s + 1.0f);
    return s < 0.09f ? near : (x < 0.0f ? -far : far);
}

INLINE int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ------------------------------------------------------------------------------------------------
// products in fp32

const int64_t PANEL = WIDE * LANES;  // numbers side by side in a packed panel
const int R = 6;                     // sums of a block: R x WIDE vectors
const int64_t WIDTH = 256;           // of a product that is written at a time
const int64_t DEPTH = WIDE == 4 ? 128 : 256;  // of a panel of h that stays in the first cache

// out[r][:] (+)= sum over k of a(r, k) * b(k)[:] for ROWS_ rows r and C vectors.
// a(r, k) = a[r * a_row + k * a_step]; every `depth` steps of k, a moves on by a_panel. `out` joins
// last: its roundings are those of a number per call, not of one per k.
template <int ROWS_, int C>
void block(const float* a, int64_t a_row, int64_t a_step, int64_t a_panel, int64_t panels,
           int64_t depth, const float* b, float* out, int64_t out_row, bool add) {
    V sum[ROWS_][C];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[r][c] = V{};
    for (int64_t p = 0; p < panels; p++, a += a_panel) {
        const float* x = a;
        for (int64_t k = 0; k < depth; k++, x += a_step, b += PANEL) {
            V right[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) right[c] = load(b + c * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS_; r++) {
                V left = all(x[r * a_row]);
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) sum[r][c] += left * right[c];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            float* at = out + r * out_row + c * LANES;
            store(at, add ? load(at) + sum[r][c] : sum[r][c]);
        }
}

typedef void (*Block)(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*,
                      float*, int64_t, bool);

template <int C>
Block block_of(int64_t rows) {
    static const Block table[R] = {block<1, C>, block<2, C>, block<3, C>,
                                   block<4, C>, block<5, C>, block<6, C>};
    return table[rows - 1];
}

// The block for what is left of `rows` and `width` numbers.
Block pick(int64_t rows, int64_t width) {
    int64_t vectors = std::min<int64_t>((width + LANES - 1) / LANES, WIDE);
#if WIDE == 4
    if (vectors == 4) return block_of<4>(rows);
    if (vectors == 3) return block_of<3>(rows);
#endif
    return vectors == 2 ? block_of<2>(rows) : block_of<1>(rows);
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// z^T of ROWS_ columns and C vectors of tokens from pairs of bf16: pairs along D.
template <int ROWS_, int C>
void pairs_block(const char* a, int64_t a_row_bytes, int64_t depth, const int32_t* b, float* out,
                 int64_t out_row) {
    __m512 sum[ROWS_][C];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++, b += PANEL) {
        __m512i right[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) right[c] = _mm512_loadu_si512(b + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS_; r++) {
            int32_t pair;
            memcpy(&pair, a + r * a_row_bytes + 4 * k, 4);
            __m512i left = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++)
                sum[r][c] = _mm512_dpbf16_ps(sum[r][c], (__m512bh)left, (__m512bh)right[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * out_row + c * LANES, sum[r][c]);
}

template <int C>
void pairs(int64_t rows, const char* a, int64_t a_row_bytes, int64_t depth, const int32_t* b,
           float* out, int64_t out_row) {
    switch (rows) {
        case 1: return pairs_block<1, C>(a, a_row_bytes, depth, b, out, out_row);
        case 2: return pairs_block<2, C>(a, a_row_bytes, depth, b, out, out_row);
        case 3: return pairs_block<3, C>(a, a_row_bytes, depth, b, out, out_row);
        case 4: return pairs_block<4, C>(a, a_row_bytes, depth, b, out, out_row);
        case 5: return pairs_block<5, C>(a, a_row_bytes, depth, b, out, out_row);
        default: return pairs_block<6, C>(a, a_row_bytes, depth, b, out, out_row);
    }
}
#endif

// ------------------------------------------------------------------------------------------------
// one thread's part

// Bytes of a thread's buffers, and where each begins.
struct Layout {
    int64_t head, panels, z, e, small, bytes;

    explicit Layout(const Problem& p) {
        int64_t wide = up(p.D, 64), place = 0;
        auto take = [&](int64_t n) { return (place += up(n, 64)) - up(n, 64); };
        head = take(p.tile * wide * (p.bf16 ? 2 : 4));    // a tile of W, padded with zeros
        panels = take(p.tile * wide * 4);                 // the same, packed
        z = take(p.tile * STRIDE * 4);
        e = take(p.tile * STRIDE * 4);
        small = take(p.tile * 4 + p.tile / CHUNK);        // which columns the channel takes
        bytes = place;
    }
};

// Bytes of h, packed, which all threads read.
int64_t packed_rows(const Problem& p) { return up(up(p.N, 64) * up(p.D, 64) * 4, 64); }

struct Thread {
    const Problem& p;
    int64_t first_row, last_row, first_column, last_column, split;
    int64_t wide, padded;  // D and N with their padding
    int64_t out_row;       // of a product
    const char* packed;    // h
    char *head, *panels;
    float *z, *e, *outside;  // outside [tile]: -inf at columns that the channel leaves out, else 0
    uint8_t* live;         // [tile / CHUNK]: does the channel sum over a column of this chunk?
    // the tile at hand
    int64_t start, columns, whole;  // whole: columns with their padding
    const char* rows;      // its head rows
    int64_t row_bytes;

    Thread(const Problem& p, const char* packed, char* buffers, int64_t group, int64_t split)
        : p(p), split(split), wide(up(p.D, 64)), padded(up(p.N, 16)), out_row(wide + APART),
          packed(packed) {
        Layout at(p);
        head = buffers + at.head, panels = buffers + at.panels;
        z = reinterpret_cast<float*>(buffers + at.z), e = reinterpret_cast<float*>(buffers + at.e);
        outside = reinterpret_cast<float*>(buffers + at.small);
        live = reinterpret_cast<uint8_t*>(outside + p.tile);
        int64_t blocks = up(p.N, 64) / 64, chunks = up(p.V, CHUNK) / CHUNK;
        first_row = blocks * group / p.row_groups * 64;
        last_row = std::min(p.N, blocks * (group + 1) / p.row_groups * 64);
        first_column = chunks * split / p.splits * CHUNK;
        last_column = std::min(p.V, chunks * (split + 1) / p.splits * CHUNK);
    }

    int64_t item() const { return p.bf16 ? 2 : 4; }

    void run() {
        for (int i = 0; i < p.channels; i++) {
            const Channel& c = p.channel[i];
            int64_t from = split * padded + first_row, count = last_row - first_row;
            std::fill_n(c.total + from, count, 0.0);
            if (c.entropy) std::fill_n(c.entropy + from, count, 0.0);
            if (c.product) std::fill_n(c.product + from * out_row, up(count, 16) * out_row, 0.0f);
        }
#if defined(__AMX_BF16__)
        if (p.bf16) configure();
#endif
        for (start = first_column; start < last_column; start += p.tile) {
            columns = std::min(p.tile, last_column - start), whole = up(columns, CHUNK);
            fetch();
            pack();
            for (int64_t n = first_row; n < last_row; n += ROWS) {
                int64_t count = std::min(ROWS, last_row - n);
                multiply_in(n, count);
                transform(n, count);
                for (int i = 0; i < p.channels; i++) {
                    const Channel& c = p.channel[i];
                    if (!mark(c)) continue;
                    if (c.entropy)
                        softmax<true>(c, n, count);
                    else
                        softmax<false>(c, n, count);
                    if (c.product) multiply_out(c, n, count);
                }
            }
        }
#if defined(__AMX_BF16__)
        if (p.bf16) _tile_release();
#endif
    }

    // The head rows of the tile: where they lie, if they need no padding, else a padded copy.
    void fetch() {
        const char* W = static_cast<const char*>(p.W) + start * p.W_row * item();
        if (p.W_column == 1 && columns % CHUNK == 0 && p.D % 64 == 0) {
            rows = W, row_bytes = p.W_row * item();
            return;
        }
        rows = head, row_bytes = wide * item();
        for (int64_t v = 0; v < whole; v++) {
            char* out = head + v * row_bytes;
            const char* in = W + v * p.W_row * item();
            if (v >= columns) {
                memset(out, 0, row_bytes);
                continue;
            }
            if (p.W_column == 1)
                memcpy(out, in, p.D * item());
            else
                for (int64_t d = 0; d < p.D; d++)
                    memcpy(out + d * item(), in + d * p.W_column * item(), item());
            memset(out + p.D * item(), 0, row_bytes - p.D * item());
        }
    }

    // z^T = scale * (W h^T + bias), capped; -inf where a row leaves a column out, and as padding.
    void transform(int64_t n, int64_t count) {
        int64_t width = up(count, LANES);
        if (p.bias || p.scale != 1 || p.softcap != 0) {
            for (int64_t v = 0; v < columns; v++) {
                float b = p.bias ? p.bias[start + v] : 0.0f;
                for (int64_t i = 0; i < width; i += LANES) {
                    V x = (load(z + v * STRIDE + i) + b) * p.scale;
                    if (p.softcap != 0) x = p.softcap * hyperbolic_tangent(x / p.softcap);
                    store(z + v * STRIDE + i, x);
                }
            }
        }
        for (int64_t v = columns; v < whole; v++) std::fill_n(z + v * STRIDE, width, -INFINITY);
        const int64_t *begin = p.held_column, *end = begin + p.held;
        begin = std::lower_bound(begin, end, start);
        for (auto at = begin; at < end && *at < start + columns; at++) {
            int64_t row = p.held_row[at - p.held_column] - n;
            if (row >= 0 && row < count) z[(*at - start) * STRIDE + row] = -INFINITY;
        }
    }

    bool has(const Channel& c, int64_t v) const {
        return v < columns && (c.columns == 0 || (p.keep[start + v] != 0) == (c.columns == 1));
    }

    // Fills `live` and `outside`. Does the channel take any column of the tile?
    bool mark(const Channel& c) {
        bool any = false;
        for (int64_t v = 0; v < whole; v += CHUNK) {
            bool here = c.columns == 0;
            for (int64_t i = 0; i < CHUNK && c.columns != 0; i++) {
                bool on = has(c, v + i);
                outside[v + i] = on ? 0.0f : -INFINITY, here |= on;
            }
            live[v / CHUNK] = here, any |= here;
        }
        return any;
    }

    // z / tau of LANES tokens at a column, -inf where the channel leaves it out.
    INLINE V logits(const Channel& c, int64_t v, int64_t i) const {
        V x = load(z + v * STRIDE + i);
        if (c.inverse_tau != 1) x = x * c.inverse_tau;
        return c.columns == 0 || outside[v] == 0 ? x : all(-INFINITY);
    }

    template <bool ENTROPY>
    void softmax(const Channel& c, int64_t n, int64_t count) {
        for (int64_t i = 0; i < count; i += LANES) {
            alignas(64) float shift[LANES], top[LANES];
            int64_t lanes = std::min<int64_t>(LANES, count - i), at = split * padded + n + i;
            V most[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
            for (int64_t v = 0; v < whole; v += 4)
                if (live[v / CHUNK])
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) most[j] = greater(logits(c, v + j, i), most[j]);
            store(top, greater(greater(most[0], most[1]), greater(most[2], most[3])));
            for (int j = 0; j < LANES; j++) {
                shift[j] = j < lanes ? c.shift[at + j] : 0.0f;
                if (j < lanes && top[j] > shift[j] + JUMP) {
                    rescale(c, at + j, top[j]);
                    shift[j] = top[j];
                }
            }
            V reference = load(shift);
            for (int64_t v = 0; v < whole; v += CHUNK) {
                if (!live[v / CHUNK]) continue;
                V total = {}, entropy = {};
                alignas(64) float chunk[CHUNK * LANES];
                for (int64_t j = 0; j < CHUNK; j++) {
                    V x = logits(c, v + j, i) - reference, value = exponential(x);
                    total += value;
                    if (ENTROPY) entropy -= value * (x < LOWEST ? all(LOWEST) : x);
                    if (p.softcap != 0) {
                        V t = load(z + (v + j) * STRIDE + i) / p.softcap;
                        value *= x < LOWEST ? V{} : 1.0f - t * t;  // t is -inf where e is 0
                    }
                    store(chunk + j * LANES, value);
                }
                if (c.product) keep_e(chunk, v, i);
                for (int64_t j = 0; j < lanes; j++) {
                    c.total[at + j] += total[j];
                    if (ENTROPY) c.entropy[at + j] += entropy[j];
                }
            }
        }
    }

    // Refers a row's sums to another shift, as Sums.rescale.
    void rescale(const Channel& c, int64_t row, float to) {
        float away = c.shift[row] - to, r = std::exp(away);
        if (c.entropy) c.entropy[row] = r * (c.entropy[row] - double(away) * c.total[row]);
        c.total[row] *= r, c.shift[row] = to;
        if (c.product)
            for (int64_t d = 0; d < wide; d++) c.product[row * out_row + d] *= r;
    }

    // ---- by tiles of AMX, or by blocks of fp32

    void pack() {
#if defined(__AMX_BF16__)
        if (p.bf16) return pack_tiles();
#endif
        // [D / PANEL][columns][PANEL]
        float* out = reinterpret_cast<float*>(panels);
        for (int64_t v = 0; v < whole; v++) {
            const char* in = rows + v * row_bytes;
            for (int64_t d = 0; d < wide; d += LANES) {
                V x;
                if (p.bf16) {
                    auto halves = *reinterpret_cast<const LooseHalves*>(in + 2 * d);
                    I bits = __builtin_convertvector(halves, I) << 16;
                    memcpy(&x, &bits, sizeof x);
                } else {
                    x = load(reinterpret_cast<const float*>(in) + d);
                }
                store(out + (d / PANEL * p.tile + v) * PANEL + d % PANEL, x);
            }
        }
    }

    void multiply_in(int64_t n, int64_t count) {
#if defined(__AMX_BF16__)
        if (p.bf16) return tiles_in(n, count);
#endif
        for (int64_t i = 0; i < count; i += PANEL) {
            int64_t width = std::min(PANEL, count - i), group = (n + i) / PANEL;
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
            if (p.bf16) {
                auto b = reinterpret_cast<const int32_t*>(packed) + group * PANEL * (wide / 2);
                for (int64_t v = 0; v < whole; v += R) {
                    int64_t left = std::min<int64_t>(R, whole - v);
                    const char* a = rows + v * row_bytes;
                    float* out = z + v * STRIDE + i;
                    switch ((width + LANES - 1) / LANES) {
                        case 1: pairs<1>(left, a, row_bytes, wide / 2, b, out, STRIDE); break;
                        case 2: pairs<2>(left, a, row_bytes, wide / 2, b, out, STRIDE); break;
                        case 3: pairs<3>(left, a, row_bytes, wide / 2, b, out, STRIDE); break;
                        default: pairs<4>(left, a, row_bytes, wide / 2, b, out, STRIDE);
                    }
                }
                continue;
            }
#endif
            const float* a = reinterpret_cast<const float*>(panels);
            auto b = reinterpret_cast<const float*>(packed) + group * PANEL * wide;
            for (int64_t d = 0; d < wide; d += DEPTH) {
                int64_t deep = std::min(DEPTH, wide - d);
                for (int64_t v = 0; v < whole; v += R)
                    pick(std::min<int64_t>(R, whole - v), width)(
                        a + d * p.tile + v * PANEL, PANEL, 1, p.tile * PANEL, deep / PANEL, PANEL,
                        b + d * PANEL, z + v * STRIDE + i, STRIDE, d > 0);
            }
        }
    }

    // e of LANES tokens at CHUNK columns, as multiply_out reads it.
    void keep_e(const float* chunk, int64_t v, int64_t i) {
#if defined(__AMX_BF16__)
        if (p.bf16) return keep_e_tiles(chunk, v, i);
#endif
        for (int64_t j = 0; j < CHUNK; j++)
            store(e + (v + j) * STRIDE + i, load(chunk + j * LANES));
    }

    void multiply_out(const Channel& c, int64_t n, int64_t count) {
        float* out = c.product + (split * padded + n) * out_row;
        for (int64_t v = 0, end; v < whole; v = end + CHUNK) {  // runs of live chunks
            for (end = v; end < whole && live[end / CHUNK];) end += CHUNK;
            if (end == v) continue;
#if defined(__AMX_BF16__)
            if (p.bf16) {
                tiles_out(out, count, v, end);
                continue;
            }
#endif
            // By WIDTH numbers of D: with fewer, each row of the product costs a page; with more, a
            // strip of W does not stay in the second cache.
            for (int64_t first = 0; first < p.D; first += WIDTH)
                for (int64_t i = 0; i < count; i += R)
                    for (int64_t d = first; d < std::min(p.D, first + WIDTH); d += PANEL)
                        pick(std::min<int64_t>(R, count - i), p.D - d)(
                            e + v * STRIDE + i, 1, STRIDE, 0, 1, end - v,
                            reinterpret_cast<const float*>(panels) +
                                (d / PANEL * p.tile + v) * PANEL,
                            out + i * out_row + d, out_row, true);
        }
    }

#if defined(__AMX_BF16__)
    // ---- AMX. A tile is 1 KiB: 16 rows of 16 fp32 or of 32 bf16. _tile_dpbf16ps(c, a, b) adds
    // a [16, 32] times b [32, 16] to c [16, 16]; b's rows lie in pairs, [16][16][2]. Four sums c,
    // and two tiles each of a and b, fill the eight tile registers.

    // Trap: to GCC 12 the tile instructions touch no memory, so that it moves stores across them.
    static INLINE void fence() { asm volatile("" : : : "memory"); }

    static void configure() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("" : : "r"(&config) : "memory");
        _tile_loadconfig(&config);
    }

    // W of the tile in pairs of columns: [D / 32][columns / 32][2] tiles [16][16][2].
    void pack_tiles() {
        alignas(64) uint16_t order[2][32];
        for (int k = 0; k < 16; k++)
            for (int part = 0; part < 2; part++)
                order[part][2 * k] = k + 16 * part, order[part][2 * k + 1] = 32 + k + 16 * part;
        const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
        for (int64_t v = 0; v < whole; v += 2) {
            const char *a = rows + v * row_bytes, *b = a + row_bytes;
            char* out = panels + v / 32 * 2048 + v % 32 / 2 * 64;
            for (int64_t d = 0; d < wide; d += 32, out += p.tile / 32 * 2048) {
                __m512i x = _mm512_loadu_si512(a + 2 * d), y = _mm512_loadu_si512(b + 2 * d);
                _mm512_store_si512(out, _mm512_permutex2var_epi16(x, first, y));
                _mm512_store_si512(out + 1024, _mm512_permutex2var_epi16(x, second, y));
            }
        }
    }

    // z^T [columns, rows]: 32 columns by 32 (or the last 16) tokens at a time.
    void tiles_in(int64_t n, int64_t count) {
        const int64_t deep = wide / 32, bytes = STRIDE * 4;
        fence();
        for (int64_t i = 0; i < count; i += 32) {
            const char* b = packed + (n + i) / 16 * deep * 1024;
            const bool two = i + 16 < count;
            for (int64_t v = 0; v < whole; v += 32) {
                const char* a = rows + v * row_bytes;
                const char* a_next = a + 16 * row_bytes;
                float* out = z + v * STRIDE + i;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                if (two) {
                    for (int64_t k = 0; k < deep; k++) {
                        _tile_loadd(4, a + 64 * k, row_bytes);
                        _tile_loadd(6, b + 1024 * k, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, b + 1024 * (deep + k), 64);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, a_next + 64 * k, row_bytes);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                    _tile_stored(1, out + 16, bytes);
                    _tile_stored(3, out + 16 * STRIDE + 16, bytes);
                } else {
                    for (int64_t k = 0; k < deep; k++) {
                        _tile_loadd(4, a + 64 * k, row_bytes);
                        _tile_loadd(6, b + 1024 * k, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(5, a_next + 64 * k, row_bytes);
                        _tile_dpbf16ps(2, 5, 6);
                    }
                }
                _tile_stored(0, out, bytes);
                _tile_stored(2, out + 16 * STRIDE, bytes);
            }
        }
        fence();
    }

    // [16][16] numbers of 32 bits, transposed.
    static INLINE void transpose(__m512i* x) {
        __m512i y[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i += 2) {
            y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i += 4) {
            x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
            x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
            x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
            x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
        }
        // x[4 g + r], quarter q: columns 4 g .. 4 g + 3 of row 4 q + r
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m512i a = _mm512_shuffle_i32x4(x[r], x[4 + r], 0x88);
            __m512i b = _mm512_shuffle_i32x4(x[r], x[4 + r], 0xdd);
            __m512i c = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0x88);
            __m512i d = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0xdd);
            y[r] = _mm512_shuffle_i32x4(a, c, 0x88);
            y[8 + r] = _mm512_shuffle_i32x4(a, c, 0xdd);
            y[4 + r] = _mm512_shuffle_i32x4(b, d, 0x88);
            y[12 + r] = _mm512_shuffle_i32x4(b, d, 0xdd);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) x[i] = y[i];
    }

    // e of 16 tokens at 32 columns as two tiles a [16 tokens, 32 columns]: the upper 8 bits of each
    // number, cut off, and what is left, rounded to 8.
    void keep_e_tiles(const float* chunk, int64_t v, int64_t i) {
        alignas(64) uint16_t order[32];
        for (int k = 0; k < 16; k++) order[2 * k] = k, order[2 * k + 1] = 16 + k;
        const __m512i pairs = _mm512_load_si512(order), upper = _mm512_set1_epi32(0xffff0000);
        __m512i high[16], low[16];
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) {
            __m512i a = _mm512_load_si512(chunk + 32 * k);
            __m512i b = _mm512_load_si512(chunk + 32 * k + 16);
            __m512i a_high = _mm512_and_si512(a, upper), b_high = _mm512_and_si512(b, upper);
            high[k] = _mm512_or_si512(_mm512_srli_epi32(a_high, 16), b_high);
            __m512 a_low = _mm512_sub_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(a_high));
            __m512 b_low = _mm512_sub_ps(_mm512_castsi512_ps(b), _mm512_castsi512_ps(b_high));
            low[k] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(b_low, a_low));
        }
        transpose(high), transpose(low);
        // [rows / 16][columns / 32][2] tiles
        char* out = reinterpret_cast<char*>(e) + (i / 16 * (p.tile / 32) + v / 32) * 2048;
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) {
            _mm512_store_si512(out + 64 * k, high[k]);
            _mm512_store_si512(out + 1024 + 64 * k, low[k]);
        }
    }

    // out [rows, D] += e W over columns [from, to): 32 (or the last 16) tokens by 32 of D.
    void tiles_out(float* out, int64_t count, int64_t from, int64_t to) {
        const int64_t bytes = out_row * 4;
        fence();
        for (int64_t d = 0; d < p.D; d += 32) {
            for (int64_t i = 0; i < count; i += 32) {
                const bool two = i + 16 < count;
                const char* b = panels + (d / 32 * (p.tile / 32) + from / 32) * 2048;
                const char* a = reinterpret_cast<char*>(e);
                a += (i / 16 * (p.tile / 32) + from / 32) * 2048;
                const char* a_next = a + p.tile / 32 * 2048;
                float* c = out + i * out_row + d;
                _tile_loadd(0, c, bytes);
                _tile_loadd(1, c + 16, bytes);
                if (two) {
                    _tile_loadd(2, c + 16 * out_row, bytes);
                    _tile_loadd(3, c + 16 * out_row + 16, bytes);
                    for (int64_t v = from; v < to; v += 32, a += 2048, a_next += 2048, b += 2048) {
                        _tile_loadd(4, a, 64);
                        _tile_loadd(6, b, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, b + 1024, 64);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, a_next, 64);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                        _tile_loadd(4, a + 1024, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, a_next + 1024, 64);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                    _tile_stored(2, c + 16 * out_row, bytes);
                    _tile_stored(3, c + 16 * out_row + 16, bytes);
                } else {
                    for (int64_t v = from; v < to; v += 32, a += 2048, b += 2048) {
                        _tile_loadd(4, a, 64);
                        _tile_loadd(5, a + 1024, 64);
                        _tile_loadd(6, b, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(0, 5, 6);
                        _tile_loadd(7, b + 1024, 64);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_dpbf16ps(1, 5, 7);
                    }
                }
                _tile_stored(0, c, bytes);
                _tile_stored(1, c + 16, bytes);
            }
        }
        fence();
    }
#endif
};

// h as multiply_in reads it, padded with zeros: fp32 [N / PANEL][D][PANEL]; for products of bf16
// pairs [N / width][D / 2][width] pairs, width being PANEL or the 16 of an AMX tile.
void pack_rows(const Problem& p, char* packed) {
    int64_t wide = up(p.D, 64);
#if defined(__AMX_BF16__)
    const bool as_pairs = p.bf16;
    const int64_t width = p.bf16 ? 16 : PANEL;
#elif defined(__AVX512BF16__)
    const bool as_pairs = p.bf16;
    const int64_t width = PANEL;
#else
    const bool as_pairs = false;
    const int64_t width = PANEL;
#endif
    memset(packed, 0, up(p.N, 64) * wide * (as_pairs ? 2 : 4));
    for (int64_t n = 0; n < p.N; n += width) {
        int64_t lanes = std::min(width, p.N - n);
        auto fp32 = static_cast<const float*>(p.h) + n * p.D;
        auto bf16 = static_cast<const uint16_t*>(p.h) + n * p.D;
        for (int64_t d = 0; d < p.D; d++) {
            auto pair = reinterpret_cast<uint16_t*>(packed) + n * wide + d / 2 * 2 * width + d % 2;
            auto single = reinterpret_cast<float*>(packed) + n * wide + d * width;
            for (int64_t i = 0; i < lanes; i++) {
                if (as_pairs) {
                    pair[2 * i] = bf16[i * p.D + d];
                } else if (p.bf16) {
                    uint32_t bits = uint32_t(bf16[i * p.D + d]) << 16;
                    memcpy(single + i, &bits, 4);
                } else {
                    single[i] = fp32[i * p.D + d];
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// 0 if this process may run the library: AMX asks the kernel for room for its registers.
EXPORTED int32_t fastsiu_prepare() {
#if defined(__AMX_BF16__)
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? 0 : 1;
#else
    return 0;
#endif
}

EXPORTED int64_t fastsiu_workspace(const Problem* p) {
    return packed_rows(*p) + Layout(*p).bytes * p->row_groups * p->splits;
}

// 0, or 1 where the system gives no thread.
EXPORTED int32_t fastsiu_sweep(const Problem* p) {
    char *packed = static_cast<char*>(p->workspace), *buffers = packed + packed_rows(*p);
    pack_rows(*p, packed);
    int64_t bytes = Layout(*p).bytes, threads = int64_t(p->row_groups) * p->splits;
    auto work = [=](int64_t i) {
        Thread(*p, packed, buffers + i * bytes, i / p->splits, i % p->splits).run();
    };
    std::vector<std::thread> others;
    int32_t failed = 0;
    try {
        others.reserve(threads - 1);
        for (int64_t i = 1; i < threads; i++) others.emplace_back(work, i);
    } catch (const std::exception&) {
        failed = 1;
    }
    if (!failed) work(0);
    for (auto& thread : others) thread.join();
    return failed;
}

}  // extern "C"
