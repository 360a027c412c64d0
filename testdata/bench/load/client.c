#include "client.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "nbd.h"

void die(const char *format, ...)
{
	int err = errno;
	va_list args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fprintf(stderr, err ? ": %s\n" : "\n", strerror(err));
	exit(1);
}

enum {
	MAX_FD = 4096,
	RECORD = 16 << 10, // what a TLS record holds, in bytes
};

// over_tls has the state of TLS of each socket, NULL for plain text.
static SSL *over_tls[MAX_FD];

static void await(int fd, int events)
{
	struct pollfd p = {.fd = fd, .events = events};

	poll(&p, 1, -1);
}

// tls_send puts pieces together, so that as few records as possible go out.
static ssize_t tls_send(SSL *s, const struct iovec *iov, int n)
{
	static __thread char record[RECORD];
	size_t filled = 0, sent;

	for (int i = 0; i < n && filled < RECORD; i++) {
		size_t part = iov[i].iov_len < RECORD - filled ? iov[i].iov_len : RECORD - filled;

		memcpy(record + filled, iov[i].iov_base, part);
		filled += part;
	}
	if (SSL_write_ex(s, record, filled, &sent))
		return sent;
	errno = SSL_get_error(s, 0) == SSL_ERROR_WANT_WRITE ? EAGAIN : EPIPE;
	return -1;
}

ssize_t net_send(int fd, const struct iovec *iov, int n)
{
	struct msghdr m = {.msg_iov = (struct iovec *)iov, .msg_iovlen = n};

	if (over_tls[fd])
		return tls_send(over_tls[fd], iov, n);
	return sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t net_recv(int fd, void *p, size_t n)
{
	size_t got;

	if (!over_tls[fd])
		return recv(fd, p, n, 0);
	while (!SSL_read_ex(over_tls[fd], p, n, &got)) {
		if (SSL_get_error(over_tls[fd], 0) != SSL_ERROR_WANT_READ)
			return 0;
		await(fd, POLLIN);
	}
	return got;
}

void recv_full(int fd, void *p, size_t n)
{
	size_t got = 0;
	ssize_t more = 1;

	errno = 0;
	if (!over_tls[fd] && n > 0)
		got = recv(fd, p, n, MSG_WAITALL);
	while (over_tls[fd] && got < n && (more = net_recv(fd, (char *)p + got, n - got)) > 0)
		got += more;
	if (got != n)
		die("connection lost: %zd of %zu bytes came", got, n);
}

void send_full(int fd, const void *p, size_t n)
{
	errno = 0;
	if (!over_tls[fd]) {
		if (send(fd, p, n, MSG_NOSIGNAL) != (ssize_t)n)
			die("connection lost while sending");
		return;
	}
	while (n > 0) {
		struct iovec v = {(void *)p, n};
		ssize_t sent = net_send(fd, &v, 1);

		if (sent < 0 && errno != EAGAIN)
			die("connection lost while sending");
		if (sent < 0)
			await(fd, POLLOUT);
		else
			p = (const char *)p + sent, n -= sent;
	}
}

static int dial_unix(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strncpy(a.sun_path, path, sizeof a.sun_path - 1);
	if (connect(fd, (void *)&a, sizeof a))
		die("connect to %s", path);
	return fd;
}

static int dial_tcp(const char *address)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
	char host[256];
	const char *port = strrchr(address, ':');
	int fd, one = 1;

	if (port == NULL || port - address >= (long)sizeof host)
		die("%s: not HOST:PORT", address);
	memcpy(host, address, port - address);
	host[port - address] = 0;
	if (getaddrinfo(host, port + 1, &hints, &found))
		die("%s: no such address", address);
	fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(fd, found->ai_addr, found->ai_addrlen))
		die("connect to %s", address);
	freeaddrinfo(found);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	return fd;
}

// agree sends an option without data, which the server has to take.
static void agree(int fd, int number)
{
	struct nbd_option option = {htobe64(NBD_OPTION_MAGIC), htobe32(number), 0};
	struct nbd_option_reply r;

	send_full(fd, &option, sizeof option);
	recv_full(fd, &r, sizeof r);
	errno = 0;
	if (be64toh(r.magic) != NBD_OPTION_REPLY_MAGIC || be32toh(r.type) != NBD_REP_ACK)
		die("handshake: the server refuses option %d (reply %#x)", number, be32toh(r.type));
}

// tls_context reads the certificates in a folder. A server sees the client's only if it asks for it.
static SSL_CTX *tls_context(const char *folder)
{
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	char ca[PATH_MAX], cert[PATH_MAX], key[PATH_MAX];

	snprintf(ca, sizeof ca, "%s/ca-cert.pem", folder);
	snprintf(cert, sizeof cert, "%s/client-cert.pem", folder);
	snprintf(key, sizeof key, "%s/client-key.pem", folder);
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
	SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	errno = 0;
	if (!SSL_CTX_load_verify_locations(context, ca, NULL))
		die("%s: no certificates", ca);
	if (!SSL_CTX_use_certificate_chain_file(context, cert) || !SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM))
		die("%s: no certificate with %s", cert, key);
	return context;
}

// start_tls begins TLS, with a server whose certificate is by the authority in that folder.
static void start_tls(int fd, const char *folder)
{
	static SSL_CTX *context;
	SSL *s;

	agree(fd, NBD_OPT_STARTTLS);
	if (context == NULL)
		context = tls_context(folder);
	errno = 0;
	s = SSL_new(context);
	if (fd >= MAX_FD || !SSL_set_fd(s, fd) || SSL_connect(s) != 1)
		die("TLS: %s", ERR_error_string(ERR_get_error(), NULL));
	fcntl(fd, F_SETFL, O_NONBLOCK);
	over_tls[fd] = s;
}

// greet takes the server's hello and asks for the export.
static void greet(int fd, const char *name, struct manner m)
{
	struct nbd_hello hello;
	uint32_t flags, name_length = htobe32(strlen(name));
	struct nbd_option option = {htobe64(NBD_OPTION_MAGIC), htobe32(NBD_OPT_GO), htobe32(4 + strlen(name) + 2)};
	uint16_t no_infos = 0;

	recv_full(fd, &hello, sizeof hello);
	errno = 0;
	if (be64toh(hello.magic) != NBD_MAGIC || be64toh(hello.option_magic) != NBD_OPTION_MAGIC)
		die("not a newstyle NBD server");
	flags = htobe32(be16toh(hello.flags) & 3); // fixed newstyle, no zeroes
	send_full(fd, &flags, sizeof flags);
	if (m.tls)
		start_tls(fd, m.tls);
	if (m.structured)
		agree(fd, NBD_OPT_STRUCTURED_REPLY);
	send_full(fd, &option, sizeof option);
	send_full(fd, &name_length, sizeof name_length);
	if (*name)
		send_full(fd, name, strlen(name));
	send_full(fd, &no_infos, sizeof no_infos);
}

int dial(const char *address, const char *name, struct manner m, struct export *e)
{
	char data[4096];
	int fd;

	errno = 0;
	if (strncmp(address, "unix:", 5) == 0)
		fd = dial_unix(address + 5);
	else if (strncmp(address, "tcp:", 4) == 0)
		fd = dial_tcp(address + 4);
	else
		die("%s: not unix:PATH or tcp:HOST:PORT", address);
	greet(fd, name, m);
	for (;;) {
		struct nbd_option_reply r;
		struct nbd_export_info info;
		uint32_t type, length;

		recv_full(fd, &r, sizeof r);
		type = be32toh(r.type), length = be32toh(r.length);
		errno = 0;
		if (be64toh(r.magic) != NBD_OPTION_REPLY_MAGIC || length > sizeof data)
			die("handshake: malformed reply");
		recv_full(fd, data, length);
		if (type == NBD_REP_ACK)
			return fd;
		if (type != NBD_REP_INFO)
			die("handshake: the server refuses export \"%s\" (reply %#x)", name, type);
		memcpy(&info, data, sizeof info);
		if (length >= sizeof info && be16toh(info.info) == NBD_INFO_EXPORT) {
			e->size = be64toh(info.size);
			e->flushes = be16toh(info.flags) & NBD_FLAG_SEND_FLUSH;
		}
	}
}

void call(int fd, int type, uint64_t offset, void *p, size_t n)
{
	struct nbd_request r = {
		htobe32(NBD_REQUEST_MAGIC), 0, htobe16(type), offset ^ 0x5eed, htobe64(offset), htobe32(n),
	};
	struct nbd_reply reply;

	send_full(fd, &r, sizeof r);
	if (type == NBD_CMD_WRITE)
		send_full(fd, p, n);
	recv_full(fd, &reply, sizeof reply);
	errno = 0;
	if (be32toh(reply.magic) != NBD_REPLY_MAGIC || reply.cookie != r.cookie)
		die("not a reply to request type %d at %lu", type, (unsigned long)offset);
	if (reply.error)
		die("request type %d at %lu, length %zu: error %u", type, (unsigned long)offset, n, be32toh(reply.error));
	if (type == NBD_CMD_READ)
		recv_full(fd, p, n);
}

void hang_up(int fd)
{
	struct nbd_request r = {.magic = htobe32(NBD_REQUEST_MAGIC), .type = htobe16(NBD_CMD_DISC)};

	if (over_tls[fd]) {
		send_full(fd, &r, sizeof r);
		SSL_free(over_tls[fd]);
		over_tls[fd] = NULL;
	} else {
		send(fd, &r, sizeof r, MSG_NOSIGNAL); // The server may have gone.
	}
	close(fd);
}
