// Package backendtest checks that a backend keeps the contract of package
// backends. A backend's own tests are one call:
//
//	func TestConformance(t *testing.T) {
//		backendtest.Test(t, func(t testing.TB) backends.Backend {
//			return mine.New(1 << 20)
//		}, backendtest.Options{})
//	}
//
// The kit compares the backend with a slice of bytes over random requests at
// both ends of the device, tries the edges, many requests at once, and every
// optional interface that Probe finds; it passes over what is not offered. What
// it expects is what a server and its clients rely on, and no more than that.
package backendtest
