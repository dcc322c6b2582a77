"Laws of DICOM: pixels as they are meant, a size that holds for the whole image or none, and no trace of the patient."
import io, re, unicodedata, warnings

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from htlab.dicom import Veil, dicom_facts, dicom_frame, is_dicom, read_dicom, read_spacing
from htlab.source import BadFile, Source

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
H, W = 20, 30


def noise(seed, h=H, w=W): return np.random.default_rng(seed).integers(0, 255, (h, w), dtype=np.uint8)


def region(dx=.01, dy=.01, kind=1, unit=3, **kw):
    from pydicom.dataset import Dataset
    r = Dataset(); r.RegionSpatialFormat, r.RegionDataType, r.PhysicalUnitsXDirection, r.PhysicalUnitsYDirection, r.PhysicalDeltaX, r.PhysicalDeltaY = kind, 1, unit, unit, dx, dy
    for k, v in kw.items(): setattr(r, k, v)
    return r


def dicom(array, kind="MONOCHROME2", syntax="1.2.840.10008.1.2.1", encapsulated=None, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from hashlib import sha256
    generate_uid = lambda kind: f"1.2.3.{kind}.{int(sha256(array.tobytes()).hexdigest()[:12], 16)}" # the same in every run
    ds = Dataset(); ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax; ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.6.1"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(1); ds.StudyInstanceUID = generate_uid(2)
    colour = kind in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
    shape = array.shape[:-1] if colour else array.shape
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *shape[-2:], 3 if colour else 1, kind
    if len(shape) == 3: ds.NumberOfFrames = shape[0]
    if colour: ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8 * array.dtype.itemsize; ds.HighBit = ds.BitsStored - 1; ds.PixelRepresentation = int(array.dtype.kind == "i")
    if encapsulated: ds.PixelData = encapsulate(encapsulated)
    else: ds.PixelData = (b := array.tobytes()) + b"\0" * (len(b) % 2)
    if encapsulated: ds["PixelData"].VR = "OB"
    for k, v in tags.items(): setattr(ds, k, v)
    ds.save_as(out := io.BytesIO(), enforce_file_format=True)
    return out.getvalue()


CLEAN = dict(BurnedInAnnotation="NO", PatientName="", PatientID="")
NAME, WHO = "Kowalczyk^Zdzislawa", "ID-550123"
PERSON = dict(PatientName=NAME, PatientID=WHO, PatientBirthDate="19480317", OtherPatientIDs="OLD-9981", AccessionNumber="ACC4711", PatientAddress="Lipowa 7", ReferringPhysicianName="Nowak^Jan")
def traces(data): return [w for w in ("kowalczyk", "zdzislawa", "550123", "19480317", "9981", "acc4711", "lipowa", "nowak") if w in data.lower()]


# ---- what the file knows

@pytest.mark.parametrize("tags, mm, why", [
    (dict(SequenceOfUltrasoundRegions=[region(.0075, -.0075)]), "0.075", ""), (dict(SequenceOfUltrasoundRegions=[region(), region()]), "0.1", ""), (dict(SequenceOfUltrasoundRegions=[region(), region(.5, .5, kind=3)]), "0.1", ""),
    (dict(SequenceOfUltrasoundRegions=[region(.01, .02)]), "", "not square"), (dict(SequenceOfUltrasoundRegions=[region(), region(.02, .02)]), "", "2 regions disagree"), (dict(SequenceOfUltrasoundRegions=[region(unit=4)]), "", "no size"), (dict(SequenceOfUltrasoundRegions=[region(kind=3)]), "", "no size"),
    (dict(SequenceOfUltrasoundRegions=[region(0, 0)]), "", "absurd"), (dict(SequenceOfUltrasoundRegions=[region(float("nan"), 1)]), "", "absurd"), (dict(SequenceOfUltrasoundRegions=[region(unit=0)], PixelSpacing=[.2, .2]), "0.2", ""), (dict(PixelSpacing=[.2, .3]), "", "not square"), (dict(PixelSpacing=[.25, .25]), "0.25", ""), ({}, "", "no size")])
def test_spacing_holds_for_the_whole_image_or_is_left_out(tags, mm, why):
    got = read_spacing(read_dicom(dicom(noise(0), **tags)))
    assert got[0] == mm and why in got[1] and bool(got[1]) == bool(why)


def test_pixels_are_as_meant():
    a, deep, rgb = noise(0), (noise(1).astype(np.uint16) * 16), np.stack([noise(2), noise(3), noise(4)], -1)
    frame = lambda *x, i=0, **kw: dicom_frame(read_dicom(dicom(*x, **kw)), i)
    assert (frame(a) == a).all() and (frame(a, "MONOCHROME1") == 255 - a).all() and (frame(rgb, "RGB") == rgb).all()
    assert frame(deep, BitsStored=12, HighBit=11).max() == 255 and abs(frame(deep).astype(int) - (deep - deep.min()) * 255. / np.ptp(deep)).max() <= 1 and (frame(a.astype(np.uint16), BitsStored=8, HighBit=7) == a).all()
    signed = (a.astype(np.int16) - 100) * 9; assert np.corrcoef(frame(signed).ravel(), a.ravel())[0, 1] > .999
    from pydicom.pixels import convert_color_space
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL"); assert abs(frame(ybr, "YBR_FULL").astype(int) - rgb).max() <= 3
    lut = np.random.default_rng(0).integers(0, 2 ** 16, (3, 256)).astype("<u2")
    tags = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")} | {f"{c}PaletteColorLookupTableData": lut[k].tobytes() for k, c in enumerate(("Red", "Green", "Blue"))}
    assert (frame(a, "PALETTE COLOR", **tags) == np.stack([lut[k][a] >> 8 for k in range(3)], -1)).all()
    loop = np.stack([noise(9 + k) for k in range(5)]); assert all((frame(loop, i=k) == loop[k]).all() for k in range(5))
    Image.fromarray(np.kron(rgb[:5, :6], np.ones((4, 5, 1), np.uint8))).save(jpeg := io.BytesIO(), "jpeg", quality=95, subsampling=0)
    got = frame(rgb, "YBR_FULL", syntax="1.2.840.10008.1.2.4.50", encapsulated=[jpeg.getvalue()])
    assert abs(got.astype(int) - np.asarray(Image.open(jpeg))).max() <= 4
    ds = read_dicom(dicom(loop)); ds.compress("1.2.840.10008.1.2.5"); ds.save_as(out := io.BytesIO(), enforce_file_format=True)
    assert all((dicom_frame(read_dicom(out.getvalue()), k) == loop[k]).all() for k in range(5))


@pytest.mark.parametrize("harm, word", [(lambda b: b"", "is empty"), (lambda b: b[132:], "is no DICOM file: the mark DICM is missing"), (lambda b: b[:-99], "is truncated: its header claims 600 bytes of pixels, 501"), (lambda b: b[:200], "is truncated|is damaged")])
def test_what_is_no_whole_dicom_is_one_clear_line(harm, word):
    with pytest.raises(BadFile, match=f"a.dcm: ({word})") as e: read_dicom(harm(dicom(noise(0), **PERSON)), "a.dcm")
    assert "\n" not in str(e.value) and not traces(str(e.value))


def test_dicom_is_known_by_its_first_bytes_or_its_ending(tmp_path):
    for name, data in {"IM0": dicom(noise(0)), "b.DCM": b"", "c.txt": b"text", "d": b"DICM" * 40, "e": b""}.items(): (tmp_path / name).write_bytes(data)
    with Source(tmp_path) as s: assert {n for n in s.names if is_dicom(s, n)} == {"IM0", "b.DCM", "d"} # bytes 128 to 131 of d say so


# ---- what nobody else should know

def test_facts_and_notes_quote_no_header():
    f = dicom_facts(read_dicom(dicom(np.stack([noise(0)] * 3), **PERSON | dict(BurnedInAnnotation="YES", PixelSpacing=[.2, .2]))))
    assert (f["frames"], f["patient"], f["spacing"]) == (3, WHO, "0.2") and f["study"].startswith("1.2.3.2.") and not traces("".join(f["notes"])) and sorted(n[:10] for n in f["notes"]) == ["text is bu", "the header"]
    f = dicom_facts(read_dicom(dicom(noise(0), **CLEAN)))
    assert (f["frames"], f["patient"], f["spacing"]) == (1, "", "") and [n.partition(":")[0] for n in f["notes"]] == ["no PatientID", "no spacing"]
    for nobody in ("ANONYMOUS", "0000", "none", "no name"): assert dicom_facts(read_dicom(dicom(noise(0), **CLEAN | dict(PatientID=nobody, PatientName=nobody))))["notes"] == f["notes"]


def test_facts_of_an_absurd_header_are_a_bad_file():
    class Trap:
        def get(self, *_): raise KeyError(NAME) # foreign bytes: pydicom may raise anything, and quote anything
    with pytest.raises(BadFile, match="a.dcm: is damaged") as e: dicom_facts(Trap(), "a.dcm")
    with pytest.raises(BadFile, match="a.dcm: is damaged") as f: Veil().read(Trap(), "a.dcm")
    assert not traces(str(e.value) + str(f.value))


ACCENTS = {"a": "\u00e4", "e": "\u00e9", "i": "\u00ed", "o": "\u00f6", "u": "\u00fc", "c": "\u00e7", "n": "\u00f1"}
WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=9)

@given(WORD, WORD, st.sampled_from(["{l}_{f}", "{f} {l}", "{l}{f}", "{f}.{l}-2", "left {l}", "x{l}x", "{l}, {f}.png"]), st.sampled_from([str.upper, str.title, str.lower]), st.booleans(), st.sampled_from(["", ".dcm", ".png", ".nii.gz"]))
@settings(max_examples=60, deadline=None)
@example("rossi", "giulia", "{l}_{f}", str.upper, True, ".dcm")
def test_no_name_survives_whichever_way_it_is_written(last, first, form, case, accents, end):
    veil = Veil(b"salt"); veil.learn(f"{last}^{first}", 2)
    said = "".join(ACCENTS.get(c, c) for c in form.format(l=last, f=first)) if accents else form.format(l=last, f=first)
    known = not re.fullmatch(r"x*|(anon\w*|unknown|none|null|removed|deidentified|noname|noid)", last)
    out = veil.path(f"disc/{case(said)}{end}/1.dcm"); plain = "".join(c for c in unicodedata.normalize("NFKD", out).casefold() if c.isalnum())
    if known: assert re.fullmatch(r"(x-[0-9a-f]{10}|disc)/x-[0-9a-f]{10}(?i:\.dcm|\.png|\.nii\.gz)?/(1|x-[0-9a-f]{10})\.dcm", out)
    if known and len(last) > 4: assert last not in plain


@given(st.text(max_size=12), st.text(max_size=12), st.binary(max_size=8), st.binary(max_size=8))
def test_a_hash_is_one_persons_and_one_salts(a, b, s, t):
    assert (Veil(s).hash("patient", a) == Veil(s).hash("patient", b)) == (a == b) and (Veil(s).hash("patient", "P-1") == Veil(t).hash("patient", "P-1")) == (s == t)
    assert Veil(s).path(a) == a, "who has learnt nothing hides nothing"


def test_a_veil_knows_all_that_names_a_patient_and_leaves_the_rest():
    veil = Veil(); veil.read(read_dicom(dicom(noise(0), **PERSON)))
    for said in (NAME, "kowalczyk", "ZDZISLAWA", "Zdzis\u0142awa Kowalczyk", WHO, "550123", "1948-03-17", "OLD.9981", "acc4711", "1.2.3.1." + str(read_dicom(dicom(noise(0))).SOPInstanceUID).split(".")[-1]): assert veil.tells(said), said
    assert not any(map(veil.tells, ("thyroid left", "IM0001", "1949", "study", "1.2.3")))


def test_what_pydicom_says_of_a_value_is_not_repeated():
    bad = dicom(noise(0), **PERSON).replace(b"1.2.3.2.", b"Zdzisla.")
    with pytest.warns(UserWarning, match="Zdzisla"): __import__("pydicom").dcmread(io.BytesIO(bad)).StudyInstanceUID
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veil = Veil(); dicom_facts(read_dicom(bad, seen=veil.read)); dicom_frame(read_dicom(bad))
    assert veil.tells("zdzislawa")
