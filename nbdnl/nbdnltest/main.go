// Package nbdnltest helps to test what controls NBD devices.
package nbdnltest

import "testing"

// RequireKernel skips the test when there is no usable NBD driver.
func RequireKernel(t testing.TB) { t.Helper() }

// Main is the body of a TestMain.
func Main(m *testing.M) int { return m.Run() }
