/* What a loader without any overhead could reach: a JPEG's window decoded by libjpeg-turbo, resized with an antialiased
 * triangle filter, mirrored, normalised to float32. No language's runtime, no queue, no other thread to wait for.
 *
 *   cc -O3 -march=native -shared -fPIC limit.c -o limit.so -ljpeg -lm -lpthread
 *
 * Decoded as DALI and PIL do it: fancy upsampling, the accurate integer DCT. The windows are those of torchvision's
 * RandomResizedCrop (scale 0.08 to 1, ratio 3/4 to 4/3, ten tries), half of the images are mirrored. */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <jpeglib.h>
#include <stdlib.h>
#include <string.h>

enum { ENTROPY = 0, DECODE = 1, PLAIN = 2, TUNED = 3 };
enum { MAX_SIDE = 4096, MAX_TAPS = 64, MAX_OUT = 512, LINES = 8 };

typedef struct {
    const uint8_t *const *files;
    const size_t *sizes;
    const int64_t *order; /* which file is image i */
    int count, mode, side;
    float *out; /* (count, side, side, 3), or NULL: each thread writes over its last image, which stays in its cache */
    uint64_t seed;
    atomic_int next;
} Job;

typedef struct { int y, x, height, width, mirrored; } Window;

/* Source pixels that make up one output pixel: `num` of them from `first` on. */
typedef struct { int first, num; float weights[MAX_TAPS]; } Taps;

typedef struct {
    uint8_t *pixels;
    size_t room;
    Taps across[MAX_OUT], down[MAX_OUT];
    float line[3 * MAX_SIDE + 8];
} Scratch;

typedef float Vector __attribute__((vector_size(16), aligned(4)));

/* splitmix64 (Steele, Lea, Flood 2014): every draw is a function of its number alone. */
static double draw(uint64_t *number) {
    uint64_t z = (*number += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static Window plan(int height, int width, uint64_t number) {
    Window window = {.mirrored = draw(&number) < 0.5};
    const double low = log(3.0 / 4), high = log(4.0 / 3);
    for (int try = 0; try < 10; try++) {
        double area = (0.08 + 0.92 * draw(&number)) * height * width;
        double ratio = exp(low + (high - low) * draw(&number));
        int wide = (int)lrint(sqrt(area * ratio)), tall = (int)lrint(sqrt(area / ratio));
        if (wide < 1 || tall < 1 || wide > width || tall > height) continue;
        window.height = tall, window.width = wide;
        window.y = (int)(draw(&number) * (height - tall + 1));
        window.x = (int)(draw(&number) * (width - wide + 1));
        return window;
    }
    double ratio = (double)width / height;
    window.width = ratio > 4.0 / 3 ? (int)lrint(height * 4.0 / 3) : width;
    window.height = ratio < 3.0 / 4 ? (int)lrint(width / (3.0 / 4)) : height;
    window.y = (height - window.height) / 2, window.x = (width - window.width) / 2;
    return window;
}

/* The triangle filter, widened by the factor of a reduction, as PIL and torchvision have it. */
static void weigh(Taps *taps, int source, int target, int mirrored) {
    const double scale = (double)source / target, reach = scale > 1 ? scale : 1;
    for (int i = 0; i < target; i++) {
        Taps *own = taps + (mirrored ? target - 1 - i : i);
        const double centre = (i + 0.5) * scale;
        int first = (int)(centre - reach + 0.5), last = (int)(centre + reach + 0.5);
        if (first < 0) first = 0;
        if (last > source) last = source;
        if (last - first > MAX_TAPS) last = first + MAX_TAPS;
        double sum = 0, weights[MAX_TAPS];
        for (int j = first; j < last; j++) {
            const double weight = 1 - fabs((j + 0.5 - centre) / reach);
            sum += weights[j - first] = weight > 0 ? weight : 0;
        }
        own->first = first, own->num = last - first;
        for (int j = 0; j < own->num; j++) own->weights[j] = (float)(weights[j] / sum);
    }
}

/* One line of the resized image before it is resized across: the weighted sum of a few lines of the window. */
static void mix_lines(float *restrict line, const uint8_t *restrict pixels, size_t stride, const Taps *taps, int length) {
    const uint8_t *source = pixels + taps->first * stride;
    for (int i = 0; i < length; i++) line[i] = taps->weights[0] * source[i];
    for (int k = 1; k < taps->num; k++) {
        const float weight = taps->weights[k];
        source += stride;
        for (int i = 0; i < length; i++) line[i] += weight * source[i];
    }
}

static const float MEAN[3] = {123.675f, 116.28f, 103.53f}, STD[3] = {58.395f, 57.12f, 57.375f};

static void resize_plain(float *out, const uint8_t *pixels, size_t stride, const Window *window, int side, Scratch *own) {
    const float scales[3] = {1 / STD[0], 1 / STD[1], 1 / STD[2]};
    for (int y = 0; y < side; y++) {
        mix_lines(own->line, pixels, stride, own->down + y, 3 * window->width);
        for (int x = 0; x < side; x++) {
            const Taps *taps = own->across + x;
            const float *source = own->line + 3 * taps->first;
            float red = 0, green = 0, blue = 0;
            for (int k = 0; k < taps->num; k++, source += 3) {
                red += taps->weights[k] * source[0];
                green += taps->weights[k] * source[1];
                blue += taps->weights[k] * source[2];
            }
            *out++ = (red - MEAN[0]) * scales[0];
            *out++ = (green - MEAN[1]) * scales[1];
            *out++ = (blue - MEAN[2]) * scales[2];
        }
    }
}

/* The same with three channels in one register of four: what the fourth holds is overwritten by the next pixel. */
static void resize_tuned(float *out, const uint8_t *pixels, size_t stride, const Window *window, int side, Scratch *own) {
    const Vector mean = {MEAN[0], MEAN[1], MEAN[2], 0}, scale = {1 / STD[0], 1 / STD[1], 1 / STD[2], 0};
    for (int y = 0; y < side; y++) {
        mix_lines(own->line, pixels, stride, own->down + y, 3 * window->width);
        for (int x = 0; x < side; x++, out += 3) {
            const Taps *taps = own->across + x;
            const float *source = own->line + 3 * taps->first;
            Vector sum = *(const Vector *)source * taps->weights[0], rest = {0};
            int k = 1;
            for (; k + 1 < taps->num; k += 2) {
                rest += *(const Vector *)(source + 3 * k) * taps->weights[k];
                sum += *(const Vector *)(source + 3 * k + 3) * taps->weights[k + 1];
            }
            if (k < taps->num) rest += *(const Vector *)(source + 3 * k) * taps->weights[k];
            *(Vector *)out = (sum + rest - mean) * scale;
        }
    }
}

static void render(const Job *job, int image, float *out, Scratch *own) {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    const int64_t file = job->order[image];
    jpeg.err = jpeg_std_error(&errors); /* a damaged file ends the program: the corpus has none */
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, job->files[file], job->sizes[file]);
    jpeg_read_header(&jpeg, TRUE);
    if (job->mode == ENTROPY) {
        jpeg_read_coefficients(&jpeg);
        jpeg_destroy_decompress(&jpeg);
        return;
    }
    jpeg.out_color_space = JCS_RGB;
    jpeg.dct_method = JDCT_ISLOW;
    jpeg.do_fancy_upsampling = TRUE;
    if (jpeg.image_width > MAX_SIDE) {
        fprintf(stderr, "limit.c: an image %u pixels wide; it has room for %d\n", jpeg.image_width, MAX_SIDE);
        exit(1);
    }
    const Window window = plan(jpeg.image_height, jpeg.image_width, job->seed + ((uint64_t)image << 32));
    jpeg_start_decompress(&jpeg);
    /* Whole blocks are decoded, so the columns may begin before the window. */
    JDIMENSION x = window.x, width = window.width;
    jpeg_crop_scanline(&jpeg, &x, &width);
    if (window.y) jpeg_skip_scanlines(&jpeg, window.y);
    const size_t stride = 3 * (size_t)jpeg.output_width, needed = stride * (window.height + LINES);
    if (needed > own->room) own->pixels = realloc(own->pixels, own->room = needed);
    for (int line = 0; line < window.height;) {
        JSAMPROW lines[LINES];
        for (int k = 0; k < LINES; k++) lines[k] = own->pixels + (line + k) * stride;
        const int left = window.height - line;
        line += jpeg_read_scanlines(&jpeg, lines, left < LINES ? left : LINES);
    }
    jpeg_destroy_decompress(&jpeg);
    if (job->mode == DECODE) return;
    weigh(own->across, window.width, job->side, window.mirrored);
    weigh(own->down, window.height, job->side, 0);
    const uint8_t *corner = own->pixels + 3 * (window.x - x);
    (job->mode == TUNED ? resize_tuned : resize_plain)(out, corner, stride, &window, job->side, own);
}

static void *work(void *given) {
    Job *job = given;
    Scratch *own = calloc(1, sizeof *own);
    /* With room for a vector's fourth float after the image: the neighbour may be another thread's. */
    const size_t floats = (size_t)3 * job->side * job->side;
    float *image = malloc((floats + 4) * sizeof *image);
    for (int i; (i = atomic_fetch_add(&job->next, 1)) < job->count;) {
        render(job, i, image, own);
        if (job->out) memcpy(job->out + i * floats, image, floats * sizeof *image);
    }
    free(image), free(own->pixels), free(own);
    return NULL;
}

/* Do `count` images, order[0] to order[count - 1], on `threads` threads; `out` as in Job. Returns 0, or -1 for a request
 * that there is no room for. */
int run(const uint8_t *const *files, const size_t *sizes, const int64_t *order, int count, int mode, int side, float *out,
        uint64_t seed, int threads) {
    Job job = {files, sizes, order, count, mode, side, out, seed, 0};
    pthread_t started[64];
    if (side > MAX_OUT || threads > 64) return -1;
    for (int i = 0; i < threads; i++) pthread_create(started + i, NULL, work, &job);
    for (int i = 0; i < threads; i++) pthread_join(started[i], NULL);
    return 0;
}
