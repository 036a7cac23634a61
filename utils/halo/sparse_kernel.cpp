// Sparse inference: a program of operations over one block of LANES images, or over one image.
// Compiled by utils/halo/sparse.py; utils/halo/sparse_plan.py fills the structures and explains the layouts.
//
// Block: the unit of every map is a vector of one pixel of LANES images, so that a weight is one broadcast multiply-add.
// Image: the unit is one float, and a vector is LANES pixels of one map, row after row with the border between them.
// All offsets and pitches count units, those of terms bytes.
#include <cstdint>
#include <cstring>
#include <omp.h>

#ifndef LANES  // floats in a register
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

namespace {
constexpr int TILE = 8;  // vectors of one output channel held in registers
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

enum Kind { TILES, STRIPS, DOTS, MAX, SUM, SPLIT };

struct Term {
    int32_t offset;
    float weight;
};

struct Op {
    int64_t kind, relu, height, width, stride_y, stride_x;
    int64_t source, source_pitch, source_plane, output, output_pitch, output_plane;
    int64_t residual, residual_pitch, residual_plane;  // residual -1: none
    int64_t count;                                     // of the output channels that anything reads
    const int32_t* channels;                           // which they are
    const int32_t* starts;                             // their first terms, and the end
    const Term* terms;
    const float* bias;
    const int32_t* windows;  // pooling: from, to of each output row, then of each column. SPLIT: see there
    const float* scales;     // SUM: factor of each row, then of each column
    const int32_t* mask;     // STRIPS: -1 inside the map, 0 in the border
    int64_t step_y, step_x;  // dilation of pooling; SPLIT: phases, and rows of a phase
};

struct Map {
    int64_t offset, pitch, plane, channels, height, width;
};

struct Plan {
    int64_t base;  // of this form's maps in a thread's workspace
    int64_t count;
    const Op* ops;
    Map input, output;
    const int32_t* wanted;  // the first of each LANES neighbouring inputs of which any is read; -1 ends them
};

template <class V> V broadcast(float x) {
    V v = {};
    return v + x;
}

vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// NaN stays NaN, as in torch.
vec rectify(vec v) { return v < vec{} ? vec{} : v; }
float rectify(float v) { return v < 0 ? 0 : v; }
vec larger(vec a, vec b) { return (b > a) | (b != b) ? b : a; }
float larger(float a, float b) { return b > a || b != b ? b : a; }

template <class V> V finish(const Op& op, V v, const V* residual) {
    if (residual) v += *residual;
    return op.relu ? rectify(v) : v;
}

// R rows of C pixels of every output channel in turn; input rows stay in the cache from channel to channel.
template <int R, int C, bool STRIDED> void tile(const Op& op, const vec* in, const vec* residual, vec* out) {
    const int64_t row = op.stride_y * op.source_pitch, column = STRIDED ? op.stride_x : 1;
    for (int64_t i = 0; i < op.count; ++i) {
        vec sum[R][C];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) sum[r][c] = broadcast<vec>(op.bias[i]);
        const Term *term = op.terms + op.starts[i], *end = op.terms + op.starts[i + 1];
        for (; term < end; ++term) {
            const vec* p = (const vec*)((const char*)in + term->offset);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) sum[r][c] += p[r * row + c * column] * term->weight;
        }
        vec* to = out + op.channels[i] * op.output_plane;
        const vec* add = residual ? residual + op.channels[i] * op.residual_plane : nullptr;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c)
                to[r * op.output_pitch + c] = finish(op, sum[r][c], add ? add + r * op.residual_pitch + c : nullptr);
    }
}

typedef void (*Tile)(const Op&, const vec*, const vec*, vec*);

// Choose among rows 1, 2, 4 for narrow maps, so that about TILE sums are held, which hides the latency of each.
template <int C> Tile tile_of(int rows, bool strided) {
    if constexpr (C > TILE)
        return nullptr;
    else {
        if (strided) return tile<1, C, true>;
        if constexpr (4 * C <= TILE)
            if (rows >= 4) return tile<4, C, false>;
        if constexpr (2 * C <= TILE)
            if (rows >= 2) return tile<2, C, false>;
        return tile<1, C, false>;
    }
}

Tile tile_of(int columns, int rows, bool strided) {
    typedef Tile (*Choice)(int, bool);
    static const Choice choices[] = {tile_of<1>,  tile_of<2>,  tile_of<3>,  tile_of<4>, tile_of<5>,  tile_of<6>,
                                     tile_of<7>,  tile_of<8>,  tile_of<9>,  tile_of<10>, tile_of<11>, tile_of<12>,
                                     tile_of<13>, tile_of<14>, tile_of<15>, tile_of<16>};
    return choices[columns - 1](rows, strided);
}

int rows_of(int columns, int64_t rows, bool strided) {
    if (strided || 2 * columns > TILE || rows < 2) return 1;
    return 4 * columns > TILE || rows < 4 ? 2 : 4;
}

void tiles(const Op& op, vec* maps) {
    const bool strided = op.stride_x != 1;
    const int parts = (op.width + TILE - 1) / TILE;
    const vec* in = maps + op.source;
    for (int64_t y = 0, rows; y < op.height; y += rows) {
        rows = rows_of((op.width + parts - 1) / parts, op.height - y, strided);
        for (int64_t part = 0, x = 0, columns; part < parts; ++part, x += columns) {
            columns = (op.width - x) / (parts - part);
            const vec* residual = op.residual < 0 ? nullptr : maps + op.residual + y * op.residual_pitch + x;
            tile_of(columns, rows, strided)(op, in + y * op.stride_y * op.source_pitch + x * op.stride_x, residual,
                                            maps + op.output + y * op.output_pitch + x);
        }
    }
}

// T vectors of neighbouring pixels of every output channel in turn, U terms at once where T alone hides no latency.
template <int T, int U> void strip(const Op& op, float* maps, int64_t at) {
    const float *in = maps + op.source + at, *residual = op.residual < 0 ? nullptr : maps + op.residual + at;
    for (int64_t i = 0; i < op.count; ++i) {
        vec sum[U][T];
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) sum[u][t] = broadcast<vec>(u ? 0 : op.bias[i]);
        const Term *term = op.terms + op.starts[i], *end = op.terms + op.starts[i + 1];
        auto add = [&](vec* sums, const Term& one) {
            const float* p = (const float*)((const char*)in + one.offset);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) sums[t] += load(p + t * LANES) * one.weight;
        };
        for (; end - term >= U; term += U)
#pragma GCC unroll 16
            for (int u = 0; u < U; ++u) add(sum[u], term[u]);
        if (U > 1)
            for (; term < end; ++term) add(sum[0], *term);
        float* out = maps + op.output + op.channels[i] * op.output_plane + at;
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            vec v = sum[0][t];
#pragma GCC unroll 16
            for (int u = 1; u < U; ++u) v += sum[u][t];
            if (residual) v += load(residual + op.channels[i] * op.residual_plane + t * LANES);
            if (op.relu) v = rectify(v);
            ivec inside;
            std::memcpy(&inside, op.mask + at + t * LANES, sizeof inside);
            v = (vec)((ivec)v & inside);
            std::memcpy(out + t * LANES, &v, sizeof v);
        }
    }
}

template <int T> void (*strip_of())(const Op&, float*, int64_t) {
    if constexpr (T > TILE)
        return nullptr;
    else
        return strip<T, T == 1 ? 4 : T < 4 ? 2 : 1>;
}

void strips(const Op& op, float* maps) {
    typedef void (*Strip)(const Op&, float*, int64_t);
    static const Strip choices[] = {strip_of<1>(),  strip_of<2>(),  strip_of<3>(),  strip_of<4>(),
                                    strip_of<5>(),  strip_of<6>(),  strip_of<7>(),  strip_of<8>(),
                                    strip_of<9>(),  strip_of<10>(), strip_of<11>(), strip_of<12>(),
                                    strip_of<13>(), strip_of<14>(), strip_of<15>(), strip_of<16>()};
    const int64_t vectors = (op.height * op.output_pitch + LANES - 1) / LANES, parts = (vectors + TILE - 1) / TILE;
    for (int64_t part = 0, at = 0, length; part < parts; ++part, at += length) {
        length = (vectors - at) / (parts - part);
        choices[length - 1](op, maps, at * LANES);
    }
}

// Maps of one pixel: four sums, since one would wait for itself.
template <class V> void dots(const Op& op, V* maps) {
    const char* in = (const char*)(maps + op.source);
    for (int64_t i = 0; i < op.count; ++i) {
        V sum[4] = {broadcast<V>(op.bias[i]), {}, {}, {}};
        const Term *term = op.terms + op.starts[i], *end = op.terms + op.starts[i + 1];
        for (; end - term >= 4; term += 4)
            for (int u = 0; u < 4; ++u) sum[u] += *(const V*)(in + term[u].offset) * term[u].weight;
        for (; term < end; ++term) sum[0] += *(const V*)(in + term->offset) * term->weight;
        const V* residual = op.residual < 0 ? nullptr : maps + op.residual + op.channels[i] * op.residual_plane;
        maps[op.output + op.channels[i] * op.output_plane] =
            finish(op, (sum[0] + sum[1]) + (sum[2] + sum[3]), residual);
    }
}

template <class V, bool LARGEST> void pool(const Op& op, V* maps) {
    const int32_t *rows = op.windows, *columns = rows + 2 * op.height;
    for (int64_t i = 0; i < op.count; ++i) {
        const V* in = maps + op.source + op.channels[i] * op.source_plane;
        V* out = maps + op.output + op.channels[i] * op.output_plane;
        for (int64_t y = 0; y < op.height; ++y)
            for (int64_t x = 0; x < op.width; ++x) {
                const int64_t top = rows[2 * y], left = columns[2 * x], right = columns[2 * x + 1];
                V v = LARGEST ? in[top * op.source_pitch + left] : V{};
                for (int64_t j = top; j < rows[2 * y + 1]; j += op.step_y)
                    for (int64_t k = left; k < right; k += op.step_x) {
                        const V one = in[j * op.source_pitch + k];
                        v = LARGEST ? larger(v, one) : v + one;
                    }
                if (!LARGEST) v *= op.scales[y] * op.scales[op.height + x];
                out[y * op.output_pitch + x] = finish(op, v, (const V*)nullptr);
            }
    }
}

// Every stride-th row and column of a map by themselves, with the border in place: what a strided convolution reads.
// windows: of each phase, the input's row and column of its first pixel (negative in the border).
// height, width: of the input. output_pitch: columns of a phase. step_y: phases, step_x: rows of each.
void split(const Op& op, float* maps) {
    float* to = maps + op.output;
    for (int64_t i = 0; i < op.count; ++i)
        for (int64_t phase = 0; phase < op.step_y; ++phase) {
            const int64_t top = op.windows[2 * phase], left = op.windows[2 * phase + 1], s = op.stride_x;
            const int64_t from = left < 0 ? (-left + s - 1) / s : 0;
            int64_t until = op.width > left ? (op.width - left + s - 1) / s : 0;
            if (until > op.output_pitch) until = op.output_pitch;
            for (int64_t j = 0; j < op.step_x; ++j, to += op.output_pitch) {
                const int64_t y = top + j * op.stride_y;
                std::memset(to, 0, op.output_pitch * sizeof *to);
                if (y < 0 || y >= op.height) continue;
                const float* in = maps + op.source + op.channels[i] * op.source_plane + y * op.source_pitch + left;
                if (s == 2)
                    for (int64_t x = from; x < until; ++x) to[x] = in[2 * x];
                else
                    for (int64_t x = from; x < until; ++x) to[x] = in[s * x];
            }
        }
}

template <class V> void run(const Op& op, V* maps) {
    if (op.kind == DOTS) dots(op, maps);
    if (op.kind == MAX) pool<V, true>(op, maps);
    if (op.kind == SUM) pool<V, false>(op, maps);
    if constexpr (sizeof(V) == sizeof(vec)) {
        if (op.kind == TILES) tiles(op, maps);
    } else {
        if (op.kind == STRIPS) strips(op, maps);
        if (op.kind == SPLIT) split(op, maps);
    }
}

// The first output channel of one of several threads, so that each has about as many terms as the others.
int64_t first_of(const Op& op, int64_t thread, int64_t threads) {
    if (!op.starts) return op.count * thread / threads;
    const int64_t before = (op.starts[op.count] + op.count) * thread / threads;
    int64_t i = 0;
    while (i < op.count && op.starts[i] + i < before) ++i;
    return i;
}

Op share_of(const Op& op, int64_t thread, int64_t threads) {
    Op share = op;
    const int64_t first = first_of(op, thread, threads);
    share.count = first_of(op, thread + 1, threads) - first;
    share.channels += first;
    if (op.starts) share.starts += first, share.bias += first;
    if (op.kind == SPLIT) share.output += first * op.step_y * op.step_x * op.output_pitch;
    return share;
}

// By one thread, or by several, each with some output channels of every operation.
template <class V> void run(const Plan& plan, V* maps, int64_t threads) {
    const Op* end = plan.ops + plan.count;
    if (threads == 1) {
        for (const Op* op = plan.ops; op < end; ++op) run(*op, maps);
        return;
    }
#pragma omp parallel num_threads(threads)
    for (const Op* op = plan.ops; op < end; ++op) {
        run(share_of(*op, omp_get_thread_num(), omp_get_num_threads()), maps);
#pragma omp barrier
    }
}

// Transpose LANES vectors: each round interleaves the first half of them with the second.
void transpose(vec* rows) {
    ivec low, high;
    for (int k = 0; k < LANES; ++k) {
        low[k] = k / 2 + (k % 2) * LANES;
        high[k] = low[k] + LANES / 2;
    }
    for (int round = 1; round < LANES; round *= 2) {
        vec next[LANES];
        for (int k = 0; k < LANES / 2; ++k) {
            next[2 * k] = __builtin_shuffle(rows[k], rows[k + LANES / 2], low);
            next[2 * k + 1] = __builtin_shuffle(rows[k], rows[k + LANES / 2], high);
        }
        std::memcpy(rows, next, sizeof next);
    }
}

// Images (count, C, H, W) to maps of vectors; a block that is not full repeats its last image.
void pack_block(const Plan& plan, const float* images, int64_t count, vec* maps) {
    const Map& m = plan.input;
    const int64_t area = m.height * m.width, size = m.channels * area;
    for (const int32_t* at = plan.wanted; *at >= 0; ++at) {
        const int64_t first = *at, n = size - first < LANES ? size - first : LANES;
        vec rows[LANES] = {};
        for (int64_t k = 0; k < LANES; ++k)
            std::memcpy(&rows[k], images + (k < count ? k : count - 1) * size + first, n * sizeof(float));
        transpose(rows);
        int64_t c = first / area, y = first % area / m.width, x = first % m.width;
        for (int64_t k = 0; k < n; ++k) {
            maps[m.offset + c * m.plane + y * m.pitch + x] = rows[k];
            if (++x < m.width) continue;
            x = 0;
            if (++y == m.height) y = 0, ++c;
        }
    }
}

void unpack_block(const Plan& plan, const vec* maps, int64_t count, float* out) {
    const Map& m = plan.output;
    const int64_t size = m.channels * m.height * m.width;
    for (int64_t c = 0; c < m.channels; ++c)
        for (int64_t y = 0; y < m.height; ++y)
            for (int64_t x = 0; x < m.width; ++x, ++out) {
                const vec v = maps[m.offset + c * m.plane + y * m.pitch + x];
                for (int64_t k = 0; k < count; ++k) out[k * size] = v[k];
            }
}

// Copy a map's rows between a tensor and the maps of one image.
template <bool PACK> void copy_image(const Map& m, float* maps, float* tensor) {
    for (int64_t c = 0; c < m.channels; ++c)
        for (int64_t y = 0; y < m.height; ++y, tensor += m.width) {
            float* row = maps + m.offset + c * m.plane + y * m.pitch;
            std::memcpy(PACK ? row : tensor, PACK ? tensor : row, m.width * sizeof(float));
        }
}
}  // namespace

extern "C" int halo_sparse_lanes() { return LANES; }

// The first `images - singles` images in blocks, the last `singles` one by one; each thread owns `size` floats of
// `workspace`, whose maps have borders of zeros that nothing overwrites. If `shared`, threads take them together, one
// after the other, in the first `size` floats.
extern "C" void halo_sparse_run(const Plan* block, const Plan* image, const float* in, float* out, int64_t images,
                                int64_t singles, int64_t threads, int64_t shared, float* workspace, int64_t size) {
    const int64_t together = images - singles, blocks = (together + LANES - 1) / LANES;
    const int64_t in_size = block->input.channels * block->input.height * block->input.width;
    const int64_t out_size = block->output.channels * block->output.height * block->output.width;
    const int64_t each = shared ? threads : 1;  // threads for a block or an image
    auto work = [&](int64_t job, float* own) {
        if (job < blocks) {
            const int64_t first = job * LANES, count = together - first < LANES ? together - first : LANES;
            vec* maps = (vec*)(own + block->base);
            pack_block(*block, in + first * in_size, count, maps);
            run(*block, maps, each);
            unpack_block(*block, maps, count, out + first * out_size);
        } else {
            const int64_t first = together + job - blocks;
            float* maps = own + image->base;
            copy_image<true>(image->input, maps, const_cast<float*>(in) + first * in_size);
            run(*image, maps, each);
            copy_image<false>(image->output, maps, out + first * out_size);
        }
    };
    if (shared) {  // not within the loop below: OpenMP starts new threads for a team within a team
        for (int64_t job = 0; job < blocks + singles; ++job) work(job, workspace);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < blocks + singles; ++job) work(job, workspace + omp_get_thread_num() * size);
}
