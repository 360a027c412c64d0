//go:build !linux

package doctor

import "context"

// Close has nothing to end.
func (m *Machine) Close() error { return nil }

type bench struct{}

type trial struct{}

func (m *Machine) device(context.Context) []Finding   { return []Finding{unknown("Linux")} }
func (m *Machine) features(context.Context) []Finding { return []Finding{unknown("Linux")} }
func (m *Machine) sockets(context.Context) []Finding  { return []Finding{unknown("Linux")} }
func (m *Machine) openers(context.Context) []Finding  { return []Finding{unknown("Linux")} }
func (m *Machine) cost(context.Context) []Finding     { return []Finding{unknown("Linux")} }
