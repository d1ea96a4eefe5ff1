/* Tensor maps describe memory to the copy engines of capability 9.0 and above. A dry GPU has none, so nothing reads a
 * map and it stays empty. This file is separate from module.c, which includes the header: its prototypes differ from
 * these. */
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuTensorMapReplaceAddress(void) { return 0; }
