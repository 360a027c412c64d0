//go:build !linux

package nbdnl

func deviceNumber(string) (string, bool)        { return "", false }
func deviceNumberAt(int, string) (string, bool) { return "", false }
