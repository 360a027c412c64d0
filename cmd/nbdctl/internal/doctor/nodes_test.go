package doctor

import "testing"

// TestNodes shows what is said of devices that are not in /dev.
func TestNodes(t *testing.T) {
	const why = "as in a container whose /dev is its own; a device can't be used here without its node; " +
		"do: docker run --volume /dev:/dev …, or mount -t devtmpfs devtmpfs /dev"
	examineFiles(t, "nodes", []fileCase{
		{"healthy", nil, "ok nodes 2 devices, /dev/nbd0 to /dev/nbd1"},
		{
			"none", files{"dev/nbd0": "-", "dev/nbd1": "-"},
			"problem nodes the kernel has 2 devices, none of which is in /dev; " + why,
		},
		{
			"some", files{"dev/nbd1": "-"},
			"warning nodes 1 of 2 devices are not in /dev: /dev/nbd1; " + why,
		},
	})
}
