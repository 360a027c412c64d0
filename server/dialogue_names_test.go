package server_test

import (
	"fmt"
	"strconv"
	"strings"
)

// dialogueNames are the numbers of the protocol document, written out again. Those of extended
// headers are from its branch extension-ext-header.
var dialogueNames = map[string]uint64{
	"NBD_REP_MAGIC":              0x0003e889045565a9,
	"NBD_REQUEST_MAGIC":          0x25609513,
	"NBD_EXTENDED_REQUEST_MAGIC": 0x21e41c71,
	"NBD_SIMPLE_REPLY_MAGIC":     0x67446698,
	"NBD_STRUCTURED_REPLY_MAGIC": 0x668e33ef,
	"NBD_EXTENDED_REPLY_MAGIC":   0x6e8a278c,

	"NBD_FLAG_FIXED_NEWSTYLE":   1 << 0,
	"NBD_FLAG_NO_ZEROES":        1 << 1,
	"NBD_FLAG_C_FIXED_NEWSTYLE": 1 << 0,
	"NBD_FLAG_C_NO_ZEROES":      1 << 1,

	"NBD_FLAG_HAS_FLAGS":            1 << 0,
	"NBD_FLAG_READ_ONLY":            1 << 1,
	"NBD_FLAG_SEND_FLUSH":           1 << 2,
	"NBD_FLAG_SEND_FUA":             1 << 3,
	"NBD_FLAG_ROTATIONAL":           1 << 4,
	"NBD_FLAG_SEND_TRIM":            1 << 5,
	"NBD_FLAG_SEND_WRITE_ZEROES":    1 << 6,
	"NBD_FLAG_SEND_DF":              1 << 7,
	"NBD_FLAG_CAN_MULTI_CONN":       1 << 8,
	"NBD_FLAG_SEND_RESIZE":          1 << 9,
	"NBD_FLAG_SEND_CACHE":           1 << 10,
	"NBD_FLAG_SEND_FAST_ZERO":       1 << 11,
	"NBD_FLAG_BLOCK_STATUS_PAYLOAD": 1 << 12,

	"NBD_OPT_EXPORT_NAME":       1,
	"NBD_OPT_ABORT":             2,
	"NBD_OPT_LIST":              3,
	"NBD_OPT_PEEK_EXPORT":       4,
	"NBD_OPT_STARTTLS":          5,
	"NBD_OPT_INFO":              6,
	"NBD_OPT_GO":                7,
	"NBD_OPT_STRUCTURED_REPLY":  8,
	"NBD_OPT_LIST_META_CONTEXT": 9,
	"NBD_OPT_SET_META_CONTEXT":  10,
	"NBD_OPT_EXTENDED_HEADERS":  11,

	"NBD_REP_ACK":                 1,
	"NBD_REP_SERVER":              2,
	"NBD_REP_INFO":                3,
	"NBD_REP_META_CONTEXT":        4,
	"NBD_REP_ERR_UNSUP":           1<<31 + 1,
	"NBD_REP_ERR_POLICY":          1<<31 + 2,
	"NBD_REP_ERR_INVALID":         1<<31 + 3,
	"NBD_REP_ERR_PLATFORM":        1<<31 + 4,
	"NBD_REP_ERR_TLS_REQD":        1<<31 + 5,
	"NBD_REP_ERR_UNKNOWN":         1<<31 + 6,
	"NBD_REP_ERR_SHUTDOWN":        1<<31 + 7,
	"NBD_REP_ERR_BLOCK_SIZE_REQD": 1<<31 + 8,
	"NBD_REP_ERR_TOO_BIG":         1<<31 + 9,
	"NBD_REP_ERR_EXT_HEADER_REQD": 1<<31 + 10,

	"NBD_INFO_EXPORT":      0,
	"NBD_INFO_NAME":        1,
	"NBD_INFO_DESCRIPTION": 2,
	"NBD_INFO_BLOCK_SIZE":  3,

	"NBD_CMD_READ":         0,
	"NBD_CMD_WRITE":        1,
	"NBD_CMD_DISC":         2,
	"NBD_CMD_FLUSH":        3,
	"NBD_CMD_TRIM":         4,
	"NBD_CMD_CACHE":        5,
	"NBD_CMD_WRITE_ZEROES": 6,
	"NBD_CMD_BLOCK_STATUS": 7,
	"NBD_CMD_RESIZE":       8,

	"NBD_CMD_FLAG_FUA":         1 << 0,
	"NBD_CMD_FLAG_NO_HOLE":     1 << 1,
	"NBD_CMD_FLAG_DF":          1 << 2,
	"NBD_CMD_FLAG_REQ_ONE":     1 << 3,
	"NBD_CMD_FLAG_FAST_ZERO":   1 << 4,
	"NBD_CMD_FLAG_PAYLOAD_LEN": 1 << 5,

	"NBD_REPLY_FLAG_DONE": 1 << 0,

	"NBD_REPLY_TYPE_NONE":             0,
	"NBD_REPLY_TYPE_OFFSET_DATA":      1,
	"NBD_REPLY_TYPE_OFFSET_HOLE":      2,
	"NBD_REPLY_TYPE_BLOCK_STATUS":     5,
	"NBD_REPLY_TYPE_BLOCK_STATUS_EXT": 6,
	"NBD_REPLY_TYPE_ERROR":            1<<15 + 1,
	"NBD_REPLY_TYPE_ERROR_OFFSET":     1<<15 + 2,

	"NBD_STATE_HOLE": 1 << 0,
	"NBD_STATE_ZERO": 1 << 1,

	"NBD_EPERM":     1,
	"NBD_EIO":       5,
	"NBD_ENOMEM":    12,
	"NBD_EINVAL":    22,
	"NBD_ENOSPC":    28,
	"NBD_EOVERFLOW": 75,
	"NBD_ENOTSUP":   95,
	"NBD_ESHUTDOWN": 108,
}

// evaluate returns the value of an expression: terms with +, - or | between them, from left to
// right, of 64 bits.
func evaluate(expression string) (uint64, error) {
	sum, operator := uint64(0), byte('+')
	for rest := expression; ; {
		end := strings.IndexAny(rest, "+-|")
		term := rest
		if end >= 0 {
			term = rest[:end]
		}
		n, err := evaluateTerm(term)
		if err != nil {
			return 0, err
		}
		switch operator {
		case '+':
			sum += n
		case '-':
			sum -= n
		case '|':
			sum |= n
		}
		if end < 0 {
			return sum, nil
		}
		operator, rest = rest[end], rest[end+1:]
	}
}

// evaluateTerm returns the value of a number, of a power of two such as 2^40, or of a name.
func evaluateTerm(term string) (uint64, error) {
	if n, ok := dialogueNames[term]; ok {
		return n, nil
	}
	if exponent, ok := strings.CutPrefix(term, "2^"); ok {
		n, err := strconv.ParseUint(exponent, 10, 8)
		if err != nil || n > 63 {
			return 0, fmt.Errorf("%q is no power of two below 2^64", term)
		}
		return 1 << n, nil
	}
	n, err := strconv.ParseUint(term, 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is neither a number nor a name", term)
	}
	return n, nil
}
