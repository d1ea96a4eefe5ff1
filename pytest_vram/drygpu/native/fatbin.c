/* Finds the image of a fat binary that the card would run. cub's scratch memory depends on this image. */
#include "dry.h"
#include "fatbin.h"

#include <string.h>

#define WRAPPER_MAGIC 0x466243b1u
#define FATBIN_MAGIC 0xba55ed50u
enum { KIND_PTX = 1, KIND_ELF = 2 };

typedef struct {
    uint32_t magic;
    int32_t version;
    const void *data;
    void *unused;
} wrapper;

typedef struct {
    uint32_t magic;
    uint16_t version, header_size;
    uint64_t body_size;
} fatbin_header;

typedef struct {
    uint16_t kind, unknown;
    uint32_t header_size;
    uint64_t size;
    uint32_t compressed_size, unknown2;
    uint16_t minor, major;
    uint32_t architecture;
} image_header;

static void choose(dry_fatbin *image) {
    const wrapper *w = image->wrapper;
    int card = dry_the_card()->major * 10 + dry_the_card()->minor, ptx = 0;
    if (w == NULL || w->magic != WRAPPER_MAGIC) {
        image->binary = image->ptx = card; /* an unknown format is assumed to run */
        return;
    }
    const fatbin_header *h = w->data;
    if (h == NULL || h->magic != FATBIN_MAGIC) {
        image->binary = image->ptx = card;
        return;
    }
    const char *at = (const char *)h + h->header_size, *end = at + h->body_size;
    while (at + sizeof(image_header) <= end) {
        const image_header *i = (const image_header *)at;
        int architecture = (int)i->architecture;
        if (i->header_size == 0) break;
        if (i->kind == KIND_ELF && architecture / 10 == card / 10 && architecture <= card &&
            architecture > image->binary)
            image->binary = architecture;
        if (i->kind == KIND_PTX && architecture <= card && architecture > ptx) ptx = architecture;
        at += i->header_size + i->size;
    }
    if (image->binary) image->ptx = image->binary;
    else if (ptx) image->binary = card, image->ptx = ptx;
}

int dry_fatbin_binary(dry_fatbin *image) {
    if (!__atomic_load_n(&image->read, __ATOMIC_ACQUIRE)) {
        dry_lock();
        if (!image->read) choose(image);
        __atomic_store_n(&image->read, 1, __ATOMIC_RELEASE);
        dry_unlock();
    }
    return image->binary;
}
