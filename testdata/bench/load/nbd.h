// The NBD protocol, as far as the load generator and the floor speak it: fixed newstyle, simple and structured replies.
#pragma once

#include <endian.h>
#include <stdint.h>

enum {
	NBD_OPT_STARTTLS = 5,
	NBD_OPT_GO = 7,
	NBD_OPT_STRUCTURED_REPLY = 8,
	NBD_REP_ACK = 1,
	NBD_REP_INFO = 3,
	NBD_INFO_EXPORT = 0,

	NBD_FLAG_HAS_FLAGS = 1 << 0,
	NBD_FLAG_SEND_FLUSH = 1 << 2,
	NBD_FLAG_CAN_MULTI_CONN = 1 << 8,

	NBD_CMD_READ = 0,
	NBD_CMD_WRITE = 1,
	NBD_CMD_DISC = 2,
	NBD_CMD_FLUSH = 3,

	NBD_REPLY_FLAG_DONE = 1 << 0,
	NBD_REPLY_TYPE_NONE = 0,
	NBD_REPLY_TYPE_OFFSET_DATA = 1,
	NBD_REPLY_TYPE_OFFSET_HOLE = 2,
};

#define NBD_MAGIC 0x4e42444d41474943ull
#define NBD_OPTION_MAGIC 0x49484156454f5054ull
#define NBD_OPTION_REPLY_MAGIC 0x3e889045565a9ull
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_REPLY_MAGIC 0x67446698u
#define NBD_CHUNK_MAGIC 0x668e33efu

// All fields are big-endian; cookie is opaque to the server.
struct nbd_hello {
	uint64_t magic, option_magic;
	uint16_t flags;
} __attribute__((packed));

struct nbd_option {
	uint64_t magic;
	uint32_t option, length;
} __attribute__((packed));

struct nbd_option_reply {
	uint64_t magic;
	uint32_t option, type, length;
} __attribute__((packed));

struct nbd_export_info {
	uint16_t info;
	uint64_t size;
	uint16_t flags;
} __attribute__((packed));

struct nbd_request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
} __attribute__((packed));

struct nbd_reply {
	uint32_t magic, error;
	uint64_t cookie;
} __attribute__((packed));

// A chunk of a structured reply. Data and holes go on with their offset, holes then with their length.
struct nbd_chunk {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie;
	uint32_t length;
	uint64_t offset;
	uint32_t hole;
} __attribute__((packed));
