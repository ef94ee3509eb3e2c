// Runs kernels/cpu/sweep.cpp, which is compiled into this program, against loops in fp64.
// test_cpu.py builds it with the sanitizers of addresses and undefined behaviour. These do not see
// what the tile instructions of AMX read, so h and W end at a page that nobody may read.
//
// Exit code 0: every number as near as rounding allows. It prints how many problems it has run.

#include "../../../kernels/cpu/sweep.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <sys/mman.h>
#include <unistd.h>

namespace {

std::mt19937 source(7);

float normal() { return std::normal_distribution<float>()(source); }

int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(source); }

// Bytes whose end is the end of the readable memory.
char* guarded(int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE), whole = up(bytes, page);
    const int may = PROT_READ | PROT_WRITE, how = MAP_PRIVATE | MAP_ANONYMOUS;
    void* at = mmap(nullptr, whole + page, may, how, -1, 0);
    if (at == MAP_FAILED) abort();
    mprotect(static_cast<char*>(at) + whole, page, PROT_NONE);
    return static_cast<char*>(at) + whole - bytes;
}

// Numbers in the dtype of the problem, and what they are in fp64.
void fill(char* at, std::vector<double>& truth, bool bf16, double size) {
    for (size_t i = 0; i < truth.size(); i++) {
        float x = float(size) * normal();
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (bf16) {
            bits &= 0xffff0000;
            uint16_t half = bits >> 16;
            memcpy(at + 2 * i, &half, 2);
        } else {
            memcpy(at + 4 * i, &x, 4);
        }
        memcpy(&x, &bits, 4);
        truth[i] = x;
    }
}

struct Shape {
    int64_t N, V, D, tile;
    int row_groups, splits;
    bool bf16, bias, mask, apart, product, transposed;
    float softcap, tau;
};

double worst(const Shape& s) {
    Problem p = {};
    int64_t item = s.bf16 ? 2 : 4, rows = up(s.N, 16), out = up(s.D, 64) + APART;
    char *h = guarded(s.N * s.D * item), *W = guarded(s.V * s.D * item);
    std::vector<double> hs(s.N * s.D), Ws(s.V * s.D);
    fill(h, hs, s.bf16, 2), fill(W, Ws, s.bf16, 1 / std::sqrt(double(s.D)));
    std::vector<float> bias(s.V);
    std::vector<uint8_t> keep(s.V);
    for (auto& b : bias) b = normal();
    for (auto& k : keep) k = below(10) > 0;
    std::vector<std::pair<int64_t, int64_t>> held;
    for (int64_t n = 0; n < s.N; n++) held.emplace_back(below(s.V), n);
    std::sort(held.begin(), held.end());
    std::vector<int64_t> column, row;
    for (auto& [v, n] : held) column.push_back(v), row.push_back(n);

    p.h = h, p.W = W;
    p.bias = s.bias ? bias.data() : nullptr, p.keep = s.mask ? keep.data() : nullptr;
    p.held_column = column.data(), p.held_row = row.data();
    p.N = s.N, p.V = s.V, p.D = s.D, p.held = s.N, p.tile = s.tile, p.bf16 = s.bf16;
    p.W_row = s.transposed ? 1 : s.D, p.W_column = s.transposed ? s.V : 1;
    p.row_groups = s.row_groups, p.splits = s.splits, p.channels = s.apart ? 2 : 1;
    p.scale = 0.7f, p.softcap = s.softcap;
    std::vector<float> shift[2], product[2];
    std::vector<double> total[2], entropy[2];
    for (int c = 0; c < p.channels; c++) {
        shift[c].assign(s.splits * rows, c ? -1e30f : -50.0f);  // both have to move
        total[c].resize(s.splits * rows), entropy[c].resize(s.splits * rows);
        product[c].resize(s.splits * rows * out);
        p.channel[c] = {shift[c].data(), total[c].data(), entropy[c].data(),
                        s.product ? product[c].data() : nullptr, 1 / s.tau, !s.mask ? 0 : 1 + c};
    }
    int64_t bytes = fastsiu_workspace(&p);
    p.workspace = aligned_alloc(64, up(bytes, 64));
    if (fastsiu_sweep(&p)) abort();

    double most = 0;
    auto see = [&](double got, double want, double size) {
        double off = std::fabs(got - want) / size;
        if (!std::isnan(most) && !(off <= most)) most = off;  // NaN stays
    };
    std::vector<double> z(s.V), g(s.D);
    for (int64_t n = 0; n < s.N; n++) {
        for (int64_t v = 0; v < s.V; v++) {
            double x = s.bias ? bias[v] : 0;
            for (int64_t d = 0; d < s.D; d++)
                x += hs[n * s.D + d] * Ws[s.transposed ? d * s.V + v : v * s.D + d];
            z[v] = x * 0.7f;
            if (s.softcap != 0) z[v] = s.softcap * std::tanh(z[v] / s.softcap);
        }
        for (int c = 0; c < p.channels; c++) {
            double sum = 0, disorder = 0;
            std::fill(g.begin(), g.end(), 0.0);
            for (int64_t v = 0; v < s.V; v++) {
                bool left_out = std::binary_search(held.begin(), held.end(), std::make_pair(v, n));
                if (left_out || (s.mask && (keep[v] != 0) != (c == 0))) continue;
                double e = std::exp(z[v] / s.tau), slope = 1;
                if (s.softcap != 0) slope = 1 - std::pow(z[v] / s.softcap, 2);
                sum += e, disorder -= e * z[v] / s.tau;
                for (int64_t d = 0; d < s.D; d++)
                    g[d] += e * slope * Ws[s.transposed ? d * s.V + v : v * s.D + d];
            }
            double got = 0, got_disorder = 0;
            std::vector<double> got_g(s.D);
            for (int k = 0; k < s.splits; k++) {
                int64_t at = k * rows + n;
                double factor = std::exp(double(shift[c][at]));
                if (total[c][at] == 0) continue;
                got += factor * total[c][at];
                got_disorder += factor * (entropy[c][at] - shift[c][at] * total[c][at]);
                for (int64_t d = 0; d < s.D; d++) got_g[d] += factor * product[c][at * out + d];
            }
            if (sum == 0) {
                see(got, 0, 1);
                continue;
            }
            see(got, sum, sum), see(got_disorder, disorder, 10 * sum);
            for (int64_t d = 0; s.product && d < s.D; d++) see(got_g[d], g[d], sum);
        }
    }
    free(p.workspace);
    return most;
}

}  // namespace

int main() {
    if (fastsiu_prepare()) return 3;
    int failed = 0, problems = 0;
    const int64_t sizes[][3] = {{1, 3, 1},    {5, 61, 7},     {17, 97, 64},
                                {40, 300, 96}, {65, 200, 130}, {270, 130, 33}};
    for (auto& size : sizes) {
        for (int kind = 0; kind < 12; kind++) {
            Shape s = {};
            s.N = size[0], s.V = size[1], s.D = size[2], s.tile = kind % 2 ? 32 : 96;
            s.row_groups = int(std::min<int64_t>(1 + kind % 3 % 2, up(s.N, 64) / 64));
            s.splits = 1 + kind / 2 % 3;
            s.bf16 = kind % 2 == 0, s.bias = kind % 3 == 0, s.mask = kind % 4 > 1;
            s.product = kind != 5, s.transposed = kind == 7 || kind == 8;
            s.softcap = kind == 1 || kind == 10 ? 3.0f : 0.0f, s.tau = kind == 4 ? 2.0f : 1.0f;
            s.apart = s.mask && s.tau == 1;
            double off = worst(s);
            problems++;
            if (off <= 2e-5) continue;
            printf("N=%ld V=%ld D=%ld kind %d: off by %g\n", long(s.N), long(s.V), long(s.D), kind,
                   off);
            failed++;
        }
    }
    printf("%d problems\n", problems);
    return failed != 0;
}
