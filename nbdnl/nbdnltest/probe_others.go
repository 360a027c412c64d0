//go:build !linux

package nbdnltest

import "errors"

// Other systems have no driver to try out.

func probeIdentifiers() (bool, error)   { return false, errors.ErrUnsupported }
func probeStreamSockets() (bool, error) { return false, errors.ErrUnsupported }
func probePositiveSizes() (bool, error) { return false, errors.ErrUnsupported }
func probeForgetsTrim() (bool, error)   { return false, errors.ErrUnsupported }
func probeForgetsZeroes() (bool, error) { return false, errors.ErrUnsupported }
func probeWriteZeroes() (bool, error)   { return false, errors.ErrUnsupported }
func probeRotational() (bool, error)    { return false, errors.ErrUnsupported }
func probeNamespaces() (bool, error)    { return false, errors.ErrUnsupported }
func probeLargeBlocks() (bool, error)   { return false, errors.ErrUnsupported }
